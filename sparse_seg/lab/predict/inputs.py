"""What to segment: image and video files, folders of them, cameras; and the files that are written for it,
which are known before the work starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sparse_seg.data.listing import list_files
from sparse_seg.data.reading import IMAGE_SUFFIXES
from sparse_seg.errors import DataError
from sparse_seg.files import check_outputs, temporary_name

VIDEO_SUFFIXES = frozenset((".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"))
CAMERA = "camera:"
RULE = f"names end in {', '.join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))}"


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
    known = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    files = [path] if not path.is_dir() else list_files(path, lambda file: file.suffix.lower() in known, RULE)
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
            OverwriteError: a file that is read would be overwritten, or one be written twice.
        """
        files = [file for source in sources for file in self.files(source)]
        read = [source.path for source in sources if isinstance(source.path, Path)]
        check_outputs([*files, *self.others], [*read, *inputs])

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
