"""Which files a prediction writes, by name: known before the work starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_seg.errors import DataError
from sparse_seg.files import check_outputs, temporary_name
from sparse_seg.lab.predict.inputs import Source


@dataclass(frozen=True)
class Outputs:
    """What is asked for.

    Args:
        folder: to write to; a source's `name` lies below it.
        pictures: kinds of picture written for an image: `ids`, `overlay`, `classes`, `blocks`, `levels`,
            `steps`.
        ids, blocks: of videos, see `VideoOptions`.
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
