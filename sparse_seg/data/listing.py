"""The files of a folder: none of them left out without a word."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

from sparse_seg.errors import DataError

_LOG = logging.getLogger(__name__)
_LEFT_BY_SYSTEMS = frozenset(("Thumbs.db", "desktop.ini"))


def list_files(folder: Path, wanted: Callable[[Path], bool], rule: str) -> list[Path]:
    """Files below `folder` that are wanted, sorted; of the others, a warning is logged.

    Links are followed; one that leads nowhere counts as a file, so that reading it fails. Hidden files do not
    count.

    Args:
        rule: what is wanted, as the warning says it.

    Raises:
        DataError: the folder or one in it is missing or may not be read, or links form a circle.
    """
    files = _walk(folder)
    left_out = [file for file in files if not wanted(file)]
    if left_out:
        _LOG.warning(
            "warning: %s: %d of %d files are left out, such as %s; %s",
            *(folder, len(left_out), len(files), left_out[0].relative_to(folder), rule),
        )
    return [file for file in files if wanted(file)]


def _walk(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; check the dataset's root and split")

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check its rights")

    files, seen = list[Path](), set[str]()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            raise DataError(f"{parent}: a link to a folder that is read already; remove it")
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name) for name in names if not _is_hidden(name)]
    return sorted(files)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _LEFT_BY_SYSTEMS
