"""What an image file says of itself: its format, size, bits per channel and orientation."""

from __future__ import annotations

import mmap
import re
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sparse_seg.data.formats import PNG_SIGNATURE

Data = bytes | mmap.mmap
_GAP = rb"\s+(?:#[^\n]*\n\s*)*"  # white space and comments between a PNM's numbers
_PNM = re.compile(rb"P[2356]" + 3 * (_GAP + rb"(\d{1,9})"))
_PNM_START = 4096  # bytes in which its header ends
_WIDTH, _HEIGHT, _BITS, _ORIENTATION, _NUMBERS = 256, 257, 258, 274, 339  # TIFF's tags
_FORMS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # TIFF's types of whole numbers
_KINDS = {1: "unsigned", 2: "signed", 3: "float"}
_MOST_ENTRIES = 1 << 12  # of a TIFF's directory

# the first bytes of files that OpenCV may not read: where they stand, and what they are
_OTHERS = (
    (0, b"8BPS", "a Photoshop document"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (4, b"JXL ", "a JPEG XL picture"),
    (4, b"ftypavif", "an AVIF picture"),
    (4, b"ftyp", "a film, or a picture in a film's container"),
    (0, b"v/1\x01", "an OpenEXR picture"),
    (0, b"SIMPLE  =", "a FITS picture"),
    (128, b"DICM", "a DICOM file"),
    (0, b"GIF8", "a GIF"),
    (0, b"%PDF", "a PDF"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<!DOCTYPE", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"version https://git-lfs", "a pointer of Git LFS (git lfs pull gets the file)"),
)
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class Header(NamedTuple):
    """What a file says of its pixels.

    Args:
        kind: its format.
        width, height: px, as stored.
        bits: per channel, as stored.
        numbers: `unsigned`, `signed` or `float`.
        orientation: a TIFF's, 1 to 8 as in EXIF, and where it stands in the data.
        told: how many of 16 bits are used as OpenCV decodes them; None where only the values tell.
    """

    kind: str
    width: int
    height: int
    bits: int = 8
    numbers: str = "unsigned"
    orientation: int = 1
    place: slice | None = None
    told: int | None = None


def read_header(data: Data) -> Header | None:
    """The header of a PNG, TIFF, BMP or PNM; None of another or a broken file."""
    for signature, read in _READERS:
        if data[: len(signature)] == signature:
            try:
                return read(data)
            except (struct.error, LookupError, OverflowError):
                return None
    return None


def file_header(file: Path) -> Header | None:
    """`read_header` of a file, of which only the parts needed are read; None where it cannot be read."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return None
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read_header(data)
    except (OSError, ValueError):  # the latter: an empty file
        return None


def without_orientation(data: bytes, place: slice) -> bytes:
    """A TIFF whose orientation, which stands at `place`, is that of an upright picture."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    upright = (1).to_bytes(place.stop - place.start, order)
    return data[: place.start] + upright + data[place.stop :]


def is_heic(data: bytes) -> bool:
    """Whether it is a photo in HEIF's container coded by HEVC, as phones take them."""
    is_avif = b"avif" in data[8:64]  # its container may be HEIF's, too; OpenCV reads it
    return data[4:8] == b"ftyp" and data[8:12] in _HEIC and not is_avif


def other_format(data: bytes) -> str:
    """What a file is that OpenCV may not read, with its article; empty where that is not known."""
    return next((what for at, mark, what in _OTHERS if data[at : at + len(mark)] == mark), "")


def _png(data: Data) -> Header:
    width, height, bits = struct.unpack_from(">IIB", data, 16)
    return Header("PNG", width, height, bits)


def _bmp(data: Data) -> Header:
    width, height = struct.unpack_from("<ii", data, 18)
    return Header("BMP", abs(width), abs(height))


def _pnm(data: Data) -> Header:
    found = _PNM.match(data[:_PNM_START])
    if found is None:
        raise LookupError
    width, height, most = map(int, found.groups())
    told = most.bit_length() if 255 < most < 65535 else None
    return Header("PNM", width, height, 8 if most < 256 else 16, told=told)


def _tiff(data: Data) -> Header:
    """Of its first picture."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")  # BigTIFF: counts and places of 8 bytes
    word, count, start = (f"{order}Q", f"{order}Q", 8) if is_big else (f"{order}I", f"{order}H", 4)
    (directory,) = struct.unpack_from(word, data, start)
    (entries,) = struct.unpack_from(count, data, directory)
    inside = struct.calcsize(word)
    values: dict[int, int] = {}
    places: dict[int, slice] = {}
    for number in range(min(entries, _MOST_ENTRIES)):
        at = directory + struct.calcsize(count) + number * (4 + 2 * inside)
        tag, kind = struct.unpack_from(f"{order}HH", data, at)
        (items,) = struct.unpack_from(word, data, at + 4)
        if kind not in _FORMS or not items:
            continue
        form, place = order + _FORMS[kind], at + 4 + inside
        if struct.calcsize(form) * items > inside:  # the values stand elsewhere
            (place,) = struct.unpack_from(word, data, place)
        (values[tag],) = struct.unpack_from(form, data, place)
        places[tag] = slice(place, place + struct.calcsize(form))
    bits, numbers = values.get(_BITS, 1), _KINDS.get(values.get(_NUMBERS, 1), "unsigned")
    told = 16 if 8 < bits < 16 else None  # OpenCV spreads them over 16 bits
    turn, place_of_turn = values.get(_ORIENTATION, 1), places.get(_ORIENTATION)
    return Header("TIFF", values[_WIDTH], values[_HEIGHT], bits, numbers, turn, place_of_turn, told)


_READERS: tuple[tuple[bytes, Callable[[Any], Header]], ...] = (
    (PNG_SIGNATURE, _png),
    *((signature, _tiff) for signature in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    (b"BM", _bmp),
    *((b"P%d" % number, _pnm) for number in (2, 3, 5, 6)),
)
