"""Image and label files to arrays: whole or refused, and with the values that were stored."""

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from sparse_seg.data.formats import (
    GREY_ALPHA,
    JPEG_SIGNATURE,
    PNG_SIGNATURE,
    RGBA,
    DamagedError,
    Png,
    jpeg_end,
    read_png,
)
from sparse_seg.errors import DataError

Image = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"))
"""Of image files, lower case."""

_LOW = 1 << 12  # 16-bit pictures below it hold 12 bits
_JPEG_COMPLAINTS = ("Corrupt JPEG data", "Premature end of JPEG", "Inconsistent progression")
_HARMLESS = "bad ICC marker"
_CAPTURE = threading.RLock()
_MOST = 1 << 20  # bytes that are looked at of what is printed


class Picture(NamedTuple):
    """Pixels `[H, W, 3]` uint8 RGB, and of how many bits per channel they were made."""

    pixels: Image
    bits: int


def read_image(file: Path, upright: bool = False) -> Image:
    """Decode an image file to `[H, W, 3]` uint8 RGB.

    Of 16 bits per channel the upper 8 are kept; where all values are below 4096 it is a 12-bit picture, whose
    upper 8 of 12 are kept.

    Args:
        upright: turn a photo as its EXIF orientation says. Images with labels are read as they are stored,
            as their labels are.

    Raises:
        DataError: the file is missing, damaged, or no image of 8 or 16 bits per channel.
    """
    with captured_stderr() as printed:
        pixels = decode_image(file, upright).pixels
        complaint = jpeg_complaint(printed())
    if complaint:
        raise DataError(f"{file}: the JPEG is damaged ({complaint}); restore it from the original")
    return pixels


def decode_image(file: Path, upright: bool = False) -> Picture:
    """`read_image` without looking at what libjpeg prints, which is all it says of damage between markers."""
    data = _read_bytes(file)
    with _damage_named(file):
        if data.startswith(PNG_SIGNATURE):
            data = read_png(data).data
        elif data.startswith(JPEG_SIGNATURE):
            data = data[: jpeg_end(data)]
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    image = _decode(file, data, flags if upright else flags | cv2.IMREAD_IGNORE_ORIENTATION)
    bits = 8
    if image.dtype == np.uint16:
        bits = 16 if image.max() >= _LOW else 12
        image = (image >> (bits - 8)).astype(np.uint8)
    if image.dtype != np.uint8:
        raise DataError(f"{file}: the image is {image.dtype}; save it with 8 or 16 bits per channel")
    return Picture(np.ascontiguousarray(image[..., ::-1]), bits)


def read_label(file: Path) -> Image:
    """The values in a label PNG as they are stored, whatever its bit depth: `[H, W]` uint8 grey values or
    palette indices, or `[H, W, 3]` uint8 RGB.

    Raises:
        DataError: the file is missing, damaged, or no such PNG.
    """
    return _label_values(file, _label_png(file))


def read_label_palette(file: Path) -> list[tuple[int, int, int]]:
    """RGB of each index of a palette PNG; empty for other label PNGs."""
    return _label_png(file).palette()


def _label_png(file: Path) -> Png:
    data = _read_bytes(file)
    if data.startswith(JPEG_SIGNATURE):
        raise DataError(f"{file}: the label is a JPEG, which changes ids; save it as a PNG")
    with _damage_named(file):
        if not data.startswith(PNG_SIGNATURE):
            raise DamagedError("no PNG")
        return read_png(data)


def _label_values(file: Path, png: Png) -> Image:
    values = _decode(file, png.bare(), cv2.IMREAD_UNCHANGED)
    if png.depth < 8:
        return values // (255 // (2**png.depth - 1))  # OpenCV spreads them over 0..255
    transparent = png.colour == GREY_ALPHA or (png.colour == RGBA and not (values[..., 3] == 255).all())
    if png.depth > 8 or transparent:
        channels = 1 if values.ndim == 2 else values.shape[2]
        raise DataError(
            f"{file}: the label is {channels}-channel {values.dtype}; "
            "save it as a single-channel 8-bit PNG of class ids"
        )
    return values if values.ndim == 2 else np.ascontiguousarray(values[..., 2::-1])


def _read_bytes(file: Path) -> bytes:
    """The content of a regular file: a pipe or a device may never end.

    Raises:
        DataError: it is missing, no regular file, or may not be read.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise DataError(f"{file}: is no regular file but a folder, pipe, socket or device; name a file")
        return file.read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and file.is_symlink():
            reason = f"it links to {os.readlink(file)}, which does not exist"
        else:
            reason = error.strerror or type(error).__name__
        raise DataError(f"{file}: cannot be read ({reason}); check the path and its rights") from error


@contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    try:
        yield
    except DamagedError:
        raise _damaged(file) from None


def _damaged(file: Path) -> DataError:
    return DataError(f"{file}: truncated, corrupt or not an image; restore it from the original dataset")


def _decode(file: Path, data: bytes, flags: int) -> NDArray[Any]:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:  # instead of None, where the header promises an impossible size
        image = None
    if image is None:
        raise _damaged(file)
    return image


def jpeg_complaint(printed: str) -> str:
    """What libjpeg says of damage in the text it printed, or nothing."""
    for line in printed.splitlines():
        if line.startswith(_JPEG_COMPLAINTS) and _HARMLESS not in line:
            return line.strip()
    return ""


@contextmanager
def captured_stderr() -> Iterator[Callable[[], str]]:
    """What C libraries print to file descriptor 2 meanwhile; libjpeg has no other way to report damage.

    One thread at a time. What else is printed follows afterwards; without a descriptor 2 nothing is captured.
    """
    with _CAPTURE:
        try:
            saved = os.dup(2)
        except OSError:
            yield lambda: ""
            return
        memory = os.memfd_create("stderr")
        os.dup2(memory, 2)
        try:
            yield lambda: os.pread(memory, _MOST, 0).decode(errors="replace")
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            with suppress(OSError):
                os.write(2, _of_others(os.pread(memory, _MOST, 0)))
            os.close(memory)


def _of_others(printed: bytes) -> bytes:
    """Without the lines of image libraries, which the caller's error says better."""
    own = (b"libpng ", b"[ERROR:", b"[ WARN:", *(text.encode() for text in _JPEG_COMPLAINTS))
    return b"".join(line for line in printed.splitlines(keepends=True) if not line.startswith(own))
