"""What prediction reads and writes: image and video files, folders of them, cameras; the files that are
written for each, which are known before the work starts; pictures; and the legend of classes."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sparse_seg.config import parse_yaml
from sparse_seg.data.dataset import Image
from sparse_seg.data.folder import CLASS_FILE
from sparse_seg.data.listing import list_files
from sparse_seg.data.reading import IMAGE_SUFFIXES, read_image
from sparse_seg.errors import ConfigError, DataError
from sparse_seg.files import OverwriteError, atomic_write, check_outputs, temporary_name
from sparse_seg.lab.predict.segment import ImageSegmenter, Segmentation
from sparse_seg.lab.report.overlays import (
    colourise,
    contact_sheet,
    draw_blocks,
    draw_legend,
    draw_levels,
    write_image,
)
from sparse_seg.run.card import Card

VIDEO_SUFFIXES = frozenset((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"))
CAMERA = "camera:"
PICTURES: dict[str, Callable[[Any], Image]] = {  # of a `Segmentation`; the last two of a selective run
    "ids": Segmentation.ids,
    "overlay": Segmentation.overlay,
    "classes": lambda found: colourise(found.classes, found.colours),
    "blocks": lambda found: draw_blocks(found.image, found.fine_blocks, found.block),
    "levels": lambda found: draw_levels(found.image, found.levels, found.strides),
}
STEPS = "steps"


class Source(NamedTuple):
    """A file or a camera's number, and the name of what is written for it, below the output folder."""

    path: Path | int
    name: Path
    is_video: bool = False

    def __str__(self) -> str:
        return f"{CAMERA}{self.path}" if isinstance(self.path, int) else str(self.path)


def find_sources(inputs: Sequence[str | Path]) -> list[Source]:
    """Files, `camera:N`, and all images and videos of folders, whose sub-folders stay apart in names; of
    other files in folders, a warning is logged.

    Raises:
        DataError: a path is empty or does not exist, a folder holds no image, or two inputs would get one
            name.
    """
    named: dict[tuple[Path, bool], Source] = {}
    for source in (source for text in map(str, inputs) for source in _sources(text)):
        other = named.setdefault((source.name, source.is_video), source)
        if other != source:
            raise DataError(f"{source} and {other} would write to the same pictures; predict them one by one")
    return list(named.values())


def _sources(text: str) -> list[Source]:
    if not text:
        raise DataError("an input is an empty text; name a file or a folder, such as . for this one")
    path, number = Path(text), text.removeprefix(CAMERA)
    if text.startswith(CAMERA) and number.isdecimal():
        return [Source(int(number), Path(f"camera{number}"), True)]
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    files = [path] if not path.is_dir() else list_files(path, IMAGE_SUFFIXES | VIDEO_SUFFIXES)
    if not files:
        raise DataError(f"{path}: no image in this folder")
    top = path if path.is_dir() else path.parent
    return [
        Source(file, file.relative_to(top).with_suffix(""), file.suffix.lower() in VIDEO_SUFFIXES)
        for file in files
    ]


@dataclass(frozen=True)
class OutputFiles:
    """What is written.

    Args:
        folder: to write to; a source's `name` lies below it.
        pictures: kinds of `PICTURES` that are written for an image.
        ids, blocks: of videos: also `NAME_ids/000000.png` and so on; `NAME_blocks.mp4`.
        others: files that belong to no source.
    """

    folder: Path
    pictures: Sequence[str]
    ids: bool = False
    blocks: bool = False
    others: Sequence[Path] = ()

    def files(self, source: Source) -> list[Path]:
        """Of one source; of a video's `NAME_ids/000000.png`, ... those that are there already."""
        out = Path(self.folder, source.name)
        if not source.is_video:
            return [Path(f"{out}_{kind}.png") for kind in self.pictures]
        files = [Path(f"{out}.mp4"), *([Path(f"{out}_blocks.mp4")] if self.blocks else [])]
        return files + (sorted(Path(f"{out}_ids").glob("[0-9]*.png")) if self.ids else [])

    def check(self, sources: Sequence[Source], inputs: Sequence[Path]) -> None:
        """
        Args:
            inputs: what is read besides the sources.

        Raises:
            OverwriteError: a file that is read would be overwritten, or one be written twice; or a file
                beside its source is there already, and may be anyone's.
        """
        files = [file for source in sources for file in self.files(source)]
        read = [source.path for source in sources if isinstance(source.path, Path)]
        check_outputs([*files, *self.others], [*read, *inputs])
        for source in sources:
            folder = source.path.parent.resolve() if isinstance(source.path, Path) else None
            for file in self.files(source):
                if file.exists() and file.parent.resolve() == folder:
                    raise OverwriteError(f"{file} is there already, beside {source}; name another folder")

    def check_names(self, source: Source) -> None:
        """Raises a DataError if the name of a file is longer than the file system takes."""
        for file in self.files(source):
            there = next(folder for folder in file.absolute().parents if folder.exists())
            most = os.pathconf(there, "PC_NAME_MAX")
            if len(os.fsencode(temporary_name(file).name)) > most:
                raise DataError(
                    f"{source}: its name is too long to write {file.name[:20]}...{file.name[-20:]}, as the "
                    f"file system takes {most} bytes; rename it"
                )


def write_pictures(
    segmenter: ImageSegmenter,
    source: Source,
    outputs: OutputFiles,
    bits: int | None,
    fractions: Sequence[float] = (),
) -> dict[str, Any]:
    """Segment an image file and write the pictures that are asked for.

    Args:
        bits: see `segment`.
        fractions: of the steps, see `draw_steps`.

    Returns:
        `shares` of classes, `fine_fraction`, the number of `windows`, and the `scales` of the image's sides
        at which the network saw it.

    Raises:
        DataError: it cannot be read.
        ValueError: it is too small for the network.
    """
    assert isinstance(source.path, Path)
    image = read_image(source.path, upright=True, bits=bits)
    found = segmenter(image)
    for kind, file in zip(outputs.pictures, outputs.files(source), strict=True):
        write_image(file, draw_steps(segmenter, image, fractions) if kind == STEPS else PICTURES[kind](found))
    fine = None if found.fine_blocks is None else float(found.fine_blocks.mean())
    windows = segmenter.views_of(image).count_windows(*image.shape[:2])
    said = {"shares": found.shares(), "fine_fraction": fine, "windows": windows}
    return said | {"scales": list(found.scales)}


def draw_steps(segmenter: ImageSegmenter, image: Image, fractions: Sequence[float]) -> Image:
    """Refinement to these rising fine fractions: a column per step, prediction above blocks; what a step
    changed is white."""
    top, bottom, before = list[tuple[str, Image]](), list[tuple[str, Image]](), None
    for fraction, step in zip(fractions, segmenter.refine(image, fractions), strict=True):
        found = segmenter.refined(image, step)
        picture, title = found.overlay(), f"f={fraction:g}"
        if before is not None:
            changed = found.classes != before
            picture[changed], title = 255, f"{title}: {100 * changed.mean():.1f}% changed (white)"
        before = found.classes
        top.append((title, picture))
        bottom.append(("", PICTURES["levels"](found)))
    return contact_sheet([top, bottom])


def write_legend(card: Card, out: str | Path, ids_only: bool = False) -> None:
    """Write `classes.yaml`, which says what the values in `NAME_ids.png` mean, in the form that
    `read_class_file` reads, unless it is there; unless `ids_only` also `legend.png`.

    Raises:
        DataError: a `classes.yaml` of other classes is there.
    """
    check_legend(card, out)
    file = Path(out, CLASS_FILE)
    if not file.exists():
        atomic_write(file, _class_text(card))
    if not ids_only:
        write_image(Path(out, "legend.png"), draw_legend(card.names, card.ids, card.colours))


def check_legend(card: Card, out: str | Path) -> None:
    """Raises a DataError if `out` has a `classes.yaml` that says anything else: a data set's, perhaps, or of
    another network's pictures."""
    file = Path(out, CLASS_FILE)
    if not file.exists():
        return
    with suppress(OSError, ConfigError):
        found, own = file.read_bytes(), _class_text(card).encode()
        if found == own or parse_yaml(found, CLASS_FILE) == parse_yaml(own, CLASS_FILE):
            return
    raise DataError(f"{file} is there and says other classes than the network's; name another --out folder")


def _class_text(card: Card) -> str:
    colours = [list(colour) for colour in card.colours]
    content = {"names": list(card.names), "ids": list(card.ids), "colours": colours}
    return yaml.safe_dump(content, default_flow_style=None, sort_keys=False, allow_unicode=True, width=100)
