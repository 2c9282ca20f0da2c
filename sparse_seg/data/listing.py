"""The files of a folder or a list: none of them left out without a word.

A name may be stored in one of Unicode's forms and asked for in another: macOS writes `é` as two characters.
"""

import codecs
import logging
import os
import unicodedata
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_seg.errors import DataError, did_you_mean

_LOG = logging.getLogger(__name__)
_LEFT_BY_SYSTEMS = frozenset(("Thumbs.db", "desktop.ini"))


def require_root(root: str | Path) -> None:
    """Raises a DataError where a dataset's folder is not there."""
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such folder; set data.root to the dataset's folder")


@contextmanager
def unsaid() -> Iterator[None]:
    """Without the warnings of `list_files`: for folders whose files are not what is asked for."""
    _LOG.disabled = True
    try:
        yield
    finally:
        _LOG.disabled = False


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


def pair_files(
    images: Path, labels: Path, suffixes: Collection[str], needs_labels: bool = True
) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Images and PNG labels at the same place below two folders, apart from suffixes and from the form of
    Unicode: pairs, and all labels.

    Raises:
        DataError: a folder is missing or may not be read, there is no image, or two images or labels differ
            in suffix only.
    """
    rule = f"names end in {', '.join(sorted(suffixes))}"
    image_files = _by_stem(images, list_files(images, lambda file: file.suffix.lower() in suffixes, rule))
    if not image_files:
        raise DataError(f"{images}: no {' or '.join(sorted(suffixes))} image in it; put the split's there")
    found: list[Path] = []
    if needs_labels or labels.exists():
        found = list_files(labels, lambda file: file.suffix.lower() == ".png", "labels are .png")
    label_files = _by_stem(labels, found)
    samples = [(file, label_files.get(stem, labels / f"{stem}.png")) for stem, file in image_files.items()]
    return samples, found


def _by_stem(folder: Path, files: list[Path]) -> dict[Path, Path]:
    stems: dict[Path, Path] = {}
    for file in files:
        other = stems.setdefault(composed(file.relative_to(folder).with_suffix("")), file)
        if other is not file:
            same_look = other.name != file.name and composed(other) == composed(file)
            form = ", in another form of Unicode" if same_look else ""
            raise DataError(f"{file}: {other.name} has the same stem{form}; keep one of the two")
    return stems


def composed(path: Path) -> Path:
    """A path in the composed form of Unicode (NFC): equal where two look the same."""
    return Path(unicodedata.normalize("NFC", str(path)))


def as_stored(path: Path) -> Path:
    """The file of that name, in whatever form of Unicode it is stored; the path itself if there is none."""
    if str(path).isascii() or path.exists() or not path.parent.is_dir():
        return path
    names = (
        name for name in sorted(os.listdir(path.parent)) if composed(Path(name)).name == composed(path).name
    )
    return path.with_name(next(names, path.name))


def read_list(file: Path) -> list[str]:
    """The words of a text in UTF-8 or UTF-16, with or without a byte-order mark.

    Raises:
        DataError: it is missing or no such text.
    """
    try:
        data = file.read_bytes()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return data.decode("utf-16").split()
        if b"\0" in data[:2]:  # no mark: of two ASCII characters, one byte in two is zero
            return data.decode("utf-16-be" if data[:1] == b"\0" else "utf-16-le").split()
        return data.decode("utf-8-sig").split()
    except OSError:
        near = _near(file)
        raise DataError(f"{file}: no such list of images; check the dataset's root and split{near}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file}: is no text in UTF-8 or UTF-16; save it as UTF-8") from None


def _near(path: Path) -> str:
    """A hint at the nearest name beside the first part of a path that is not there."""
    missing = next((part for part in (path, *path.parents) if part.parent.is_dir()), path)
    return did_you_mean(missing.name, [other.name for other in missing.parent.iterdir()])


def _walk(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; check the dataset's root and split{_near(folder)}")

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
