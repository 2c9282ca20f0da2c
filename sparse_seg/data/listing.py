"""The files of a folder or a list: none of them left out without a word.

A name may be stored in one of Unicode's forms and asked for in another: macOS writes `é` as two characters.
"""

import codecs
import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_seg.errors import DataError, did_you_mean

_LOG = logging.getLogger(__name__)
_HIDDEN = (".", "Thumbs.db", "desktop.ini")  # what names begin with


@contextmanager
def unsaid() -> Iterator[None]:
    """Without the warnings of `list_files`: for folders whose files are not what is asked for."""
    _LOG.disabled = True
    try:
        yield
    finally:
        _LOG.disabled = False


def list_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files below `folder` whose names end in one of the suffixes, sorted; of others, a warning is logged.

    Links are followed; one that leads nowhere counts as a file, so that reading it fails. Hidden files do not
    count.

    Raises:
        DataError: the folder or one in it is missing or may not be read, or links form a circle.
    """
    files, ends = _walk(folder), tuple(map(str.lower, suffixes))
    wanted = [file for file in files if file.name.lower().endswith(ends)]
    if left_out := sorted({*files} - {*wanted}):
        _LOG.warning(
            "warning: %s: %d of %d files are left out, such as %s; names end in %s",
            *(folder, len(left_out), len(files), left_out[0].relative_to(folder)),
            ", ".join(sorted(suffixes)),
        )
    return wanted


def pair_files(
    images: Path,
    labels: Path,
    suffixes: Collection[str],
    label_suffix: str = ".png",
    beside: Collection[str] = (),
    needs_labels: bool = True,
) -> tuple[list[tuple[Path, Path]], list[Path]]:
    """Images and labels at the same place below two folders, apart from the ends of their names and from the
    form of Unicode: pairs, and all labels.

    Args:
        suffixes, label_suffix: what names of images and of labels end in.
        beside: what names of files beside the labels, which are not read, end in.
        needs_labels: whether the second folder must be there.

    Raises:
        DataError: a folder is missing or may not be read, there is no image, or two images or labels differ
            in suffix only.
    """
    files = _by_stem(images, suffixes)
    known = _by_stem(labels, (label_suffix,), beside) if needs_labels or labels.exists() else {}
    if not files:
        raise DataError(f"{images}: no {' or '.join(sorted(suffixes))} image in it; put the split's there")
    samples = [(file, known.get(stem, labels / f"{stem}{label_suffix}")) for stem, file in files.items()]
    return samples, list(known.values())


def _by_stem(folder: Path, suffixes: Collection[str], beside: Collection[str] = ()) -> dict[str, Path]:
    """Files whose names end in one of the suffixes, by their place below the folder without it."""
    named = re.compile(f"(.+)({'|'.join(map(re.escape, suffixes))})", re.IGNORECASE | re.DOTALL)
    stems: dict[str, Path] = {}
    for file in list_files(folder, (*suffixes, *beside)):
        if match := named.fullmatch(str(composed(file.relative_to(folder)))):
            other = stems.setdefault(match[1], file)
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
    return min((one for one in path.parent.iterdir() if composed(one) == composed(path)), default=path)


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
        files += [Path(parent, name) for name in names if not name.startswith(_HIDDEN)]
    return sorted(files)
