"""What to segment: image and video files, folders of them, cameras."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sparse_seg.data.listing import list_files
from sparse_seg.data.reading import IMAGE_SUFFIXES
from sparse_seg.errors import DataError

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
    sources: list[Source] = []
    for text in map(str, inputs):
        if not text:
            raise DataError("an input is an empty text; name a file or a folder, such as . for this one")
        path, number = Path(text), text.removeprefix(CAMERA)
        if text.startswith(CAMERA) and number.isdecimal():
            sources.append(Source(int(number), Path(f"camera{number}"), True))
        elif path.is_dir():
            found = list_files(
                path, lambda file: file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES, RULE
            )
            if not found:
                raise DataError(f"{path}: no image in this folder")
            sources += [_source(file, file.relative_to(path)) for file in found]
        elif path.exists():
            sources.append(_source(path, Path(path.name)))
        else:
            raise DataError(f"{path}: no such file or folder")
    named: dict[tuple[Path, bool], Source] = {}
    for source in sources:
        other = named.setdefault((source.name, source.is_video), source)
        if other != source:
            raise DataError(f"{source} and {other} would write to the same pictures; predict them one by one")
    return list(named.values())


def _source(file: Path, name: Path) -> Source:
    return Source(file, name.with_suffix(""), file.suffix.lower() in VIDEO_SUFFIXES)
