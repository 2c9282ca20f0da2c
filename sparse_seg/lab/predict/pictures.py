"""Predictions as pictures on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from sparse_seg.config import parse_yaml
from sparse_seg.data.dataset import Image
from sparse_seg.data.folder import CLASS_FILE
from sparse_seg.data.reading import read_image
from sparse_seg.errors import ConfigError, DataError
from sparse_seg.files import atomic_write
from sparse_seg.lab.predict.inputs import OutputFiles, Source
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


def show_blocks(found: Segmentation) -> Image:
    """The image of a selective run, darkened where it is coarse."""
    assert found.fine_blocks is not None
    return draw_blocks(found.image, found.fine_blocks, found.block)


def show_levels(found: Segmentation) -> Image:
    """The image of a selective run with every block in the colour of its stride, and a legend."""
    assert found.levels is not None
    return draw_levels(found.image, found.levels, found.strides)


PICTURES: dict[str, Callable[[Segmentation], Image]] = {
    "ids": Segmentation.ids,
    "overlay": Segmentation.overlay,
    "classes": lambda found: colourise(found.classes, found.colours),
    "blocks": show_blocks,
    "levels": show_levels,
}
STEPS = "steps"


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
    if segmenter.policy is not None:
        segmenter.policy.remember(None)  # a photo is no frame of a video
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
        bottom.append(("", show_levels(found)))
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
