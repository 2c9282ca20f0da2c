"""Image and label files to arrays: whole or refused, and with the values that were stored."""

import io
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
    INFLATION,
    JPEG_SIGNATURE,
    PNG_SIGNATURE,
    RGBA,
    DamagedError,
    Png,
    read_jpeg,
    read_png,
)
from sparse_seg.data.headers import Header, is_heic, other_format, read_header, without_orientation
from sparse_seg.errors import DataError

Image = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".heic", ".heif")
)
"""Of image files, lower case."""

GUESSED_BITS = (12, 16)  # of 16-bit files: whose values are all below 4096, and the others
_LIMITS = {"PIXELS": 1 << 30, "WIDTH": 1 << 20, "HEIGHT": 1 << 20}  # OpenCV's OPENCV_IO_MAX_IMAGE_...
# how a stored picture becomes upright, by its orientation
_TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: np.rot90,
}
_JPEG_COMPLAINTS = ("Corrupt JPEG data", "Premature end of JPEG", "Inconsistent progression")
_HARMLESS = "bad ICC marker"
_CAPTURE = threading.RLock()
_MOST = 1 << 20  # bytes that are looked at of what is printed


class Picture(NamedTuple):
    """Pixels `[H, W, 3]` uint8 RGB, of how many bits per channel they were made, and of 16-bit files the
    highest value."""

    pixels: Image
    bits: int
    highest: int | None = None


def read_image(file: Path, upright: bool = False, bits: int | None = None) -> Image:
    """Decode an image file to `[H, W, 3]` uint8 RGB.

    Args:
        upright: turn a photo as its orientation (EXIF's or a TIFF's) says. Images with labels are read as
            they are stored, as their labels are. HEIC photos are always turned.
        bits: how many of 16 bits per channel are used; the upper 8 of them are kept, and values above them
            are clipped. None takes what fits this file alone: 12 where all values are below 4096, else 16.
            `find_depth` tells it for the files of a data set or a folder together.

    Raises:
        DataError: the file is missing, damaged, too large, or no image of 8 or 16 bits per channel.
    """
    with captured_stderr() as printed:
        pixels = decode_image(file, upright, bits).pixels
        complaint = jpeg_complaint(printed())
    if complaint:
        raise DataError(f"{file}: the JPEG is damaged ({complaint}); restore it from the original")
    return pixels


def decode_image(file: Path, upright: bool = False, bits: int | None = None) -> Picture:
    """`read_image` without looking at what libjpeg prints, which is all it says of damage between markers."""
    data = _read_bytes(file)
    if is_heic(data):
        return Picture(_read_heic(file, data), 8)
    header, turn = read_header(data), None
    with _damage_named(file):
        if data.startswith(PNG_SIGNATURE):
            data = read_png(data).data
        elif data.startswith(JPEG_SIGNATURE):
            data, width, height = read_jpeg(data)
            header = Header("JPEG", width, height)
        elif header is not None and header.width * header.height > 8 * INFLATION * len(data):
            raise DamagedError("impossible size")
    if header is not None:
        _require_numbers(file, header)
        _require_size(file, header.width, header.height)
        if header.place is not None and header.orientation != 1:  # OpenCV would turn it, asked or not
            data, turn = without_orientation(data, header.place), _TURNS.get(header.orientation)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    image = _decode(file, data, flags if upright else flags | cv2.IMREAD_IGNORE_ORIENTATION)
    used, highest = 8, None
    if image.dtype == np.uint16:
        highest = int(image.max())
        used = (header and header.told) or bits or guessed_bits(highest)
        image = (np.minimum(image, 2**used - 1) >> (used - 8)).astype(np.uint8)
    if image.dtype != np.uint8:
        raise DataError(f"{file}: the image is {image.dtype}; save it with 8 or 16 bits per channel")
    if upright and turn is not None:
        image = turn(image)
    return Picture(np.ascontiguousarray(image[..., ::-1]), used, highest)


def guessed_bits(highest: int) -> int:
    """How many of 16 bits are used, where this is the highest value."""
    fewer, all_of_them = GUESSED_BITS
    return fewer if highest < 1 << fewer else all_of_them


def _require_numbers(file: Path, header: Header) -> None:
    """Raises a DataError for a whole file whose values are none of 8 or 16 bits."""
    if header.numbers != "unsigned" or header.bits > 16:
        raise DataError(
            f"{file}: is a {header.kind} of {header.bits}-bit {header.numbers} numbers, as tifffile or "
            "rasterio reads; scale the values to 0..65535 and save it with 16 bits per channel, unsigned"
        )


def _require_size(file: Path, width: int, height: int) -> None:
    """Raises a DataError for a picture that OpenCV refuses."""
    limits = {}
    for name, most in _LIMITS.items():
        said = os.environ.get(f"OPENCV_IO_MAX_IMAGE_{name}", "")
        limits[name] = int(said) if said.isdecimal() else most
    if width * height > limits["PIXELS"] or width > limits["WIDTH"] or height > limits["HEIGHT"]:
        raise DataError(
            f"{file}: is {height}x{width} px, larger than OpenCV reads (2^30 pixels, 2^20 a side); cut it "
            "into tiles, or set OPENCV_IO_MAX_IMAGE_PIXELS, OPENCV_IO_MAX_IMAGE_WIDTH or _HEIGHT"
        )


def _read_heic(file: Path, data: bytes) -> Image:
    """`[H, W, 3]` uint8 RGB, upright: HEIC's container says itself how it is turned.

    Raises:
        DataError: Pillow's plugin for it is not installed, or the file is damaged.
    """
    try:
        from PIL import Image as pillow
        from pillow_heif import register_heif_opener
    except ImportError:
        raise DataError(
            f"{file}: is a HEIC photo; to read it, pip install pillow-heif, or save it as JPEG"
        ) from None
    register_heif_opener()
    try:
        with pillow.open(io.BytesIO(data)) as photo:
            return np.array(photo.convert("RGB"), np.uint8)
    except Exception:  # each version has errors of its own
        raise _damaged(file) from None


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
    header = read_header(data)
    if header is not None and header.kind != "PNG":
        raise DataError(f"{file}: the label is a {header.kind}; save it as an 8-bit PNG of class ids")
    with _damage_named(file):
        if not data.startswith(PNG_SIGNATURE):
            raise DamagedError("no PNG")
        png = read_png(data)
    _require_size(file, png.width, png.height)
    return png


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
    if image is not None:
        return image
    if what := other_format(data):
        raise DataError(f"{file}: is {what}, which is not read here; save it as PNG, JPEG or TIFF")
    raise _damaged(file)


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
