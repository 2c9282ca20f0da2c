"""Image and label files to arrays: whole or refused, and with the values that were stored.

Decoders fill in what is missing in a damaged file, and few tell. simplejpeg raises what libjpeg only prints;
Pillow verifies a PNG's checksums and keeps palette indices; OpenCV refuses a PNG with too few rows and reads
most bit depths.
"""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL.Image
import simplejpeg
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from sparse_seg.data.headers import Header, read_header
from sparse_seg.errors import DataError

# what OpenCV (5, or 4) prints of a damaged file our error says, with the file's name
_LOGGING: Any = cv2.utils.logging if hasattr(cv2.utils, "logging") else cv2
_LOGGING.setLogLevel(0)

Image = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".heic", ".heif")
)
"""Of image files, lower case."""

_MOST_PIXELS, _LONGEST_SIDE = 1 << 30, 10**6  # that OpenCV reads
# pixels that a byte may hold: zlib makes 1032 bytes of one, a JPEG's 8x8 block takes a bit, a blank WebP none
_INFLATED, _PIXELS_PER_BYTE = 8 * 1032, {"JPEG": 512, "WEBP": 1 << 28}
_BACK = {6: 8, 8: 6}  # orientations that undo each other; the others undo themselves
_HARMLESS = "bad ICC marker"
# marks of files that are not read: where they stand, and what they are
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
    (0, b"\0\0\1\0", "an icon"),
    (-18, b"TRUEVISION-XFILE", "a TGA picture"),
    (8, b"AVI ", "a video"),
    (0, b"\x1aE\xdf\xa3", "a video"),
    (0, b"%PDF", "a PDF"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<!DOCTYPE", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"version https://git-lfs", "a pointer of Git LFS (git lfs pull gets the file)"),
)
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class Decoded(NamedTuple):
    """Pixels `[H, W, 3]` uint8 RGB, of how many bits per channel they were made, and of 16-bit files the
    highest value."""

    pixels: Image
    bits: int = 8
    highest: int = 0


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
    return decode_image(file, upright, bits).pixels


def decode_image(file: Path, upright: bool = False, bits: int | None = None) -> Decoded:
    """`read_image`, with what is known of its bits."""
    data = _read_bytes(file)
    if _is_heic(data):
        return Decoded(_read_heic(file, data))
    header = _header(file, data)
    if header.kind == "JPEG":
        image = _decode_jpeg(file, data)
    elif header.multiplies:
        with _damage_named(file):
            image = np.array(TiffImageFile(io.BytesIO(data)).convert("RGB"))
    else:
        if header.kind == "PNG":
            _verified_png(file, data)
        flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
        image = _decode(file, data, flags)[..., ::-1]
    used, highest = 8, 0
    if image.dtype == np.uint16:
        highest = int(image.max())
        used = header.told or bits or guessed_bits(highest)
        image = (np.minimum(image, 2**used - 1) >> (used - 8)).astype(np.uint8)
    if image.dtype != np.uint8:
        raise DataError(f"{file}: the image is {image.dtype}; save it with 8 or 16 bits per channel")
    if upright != (header.kind == "TIFF"):  # which OpenCV turns, asked or not
        turn = header.orientation if upright else _BACK.get(header.orientation, header.orientation)
        image = _turned(image, turn)
    return Decoded(np.ascontiguousarray(image), used, highest)


def _turned(image: Image, orientation: int) -> Image:
    """A stored picture as it looks upright; those from 5 on are transposed, too."""
    if not 1 <= orientation <= 8:
        return image
    rows, columns = ((1, 1), (1, -1), (-1, -1), (-1, 1))[(orientation - 1) % 4]
    return (image.swapaxes(0, 1) if orientation > 4 else image)[::rows, ::columns]


def guessed_bits(highest: int) -> int:
    """How many of 16 bits are used, where this is the highest value."""
    return 12 if highest < 1 << 12 else 16


def read_label(file: Path) -> Image:
    """The values in a label PNG as they are stored, whatever its bit depth: `[H, W]` uint8 grey values or
    palette indices, or `[H, W, 3]` uint8 RGB.

    Raises:
        DataError: the file is missing, damaged, or no such PNG.
    """
    data = _read_bytes(file)
    depth, png = _label_png(file, data)
    is_flat = png.mode in ("1", "L", "P")
    values = _decode(file, data, cv2.IMREAD_GRAYSCALE if is_flat else cv2.IMREAD_UNCHANGED)
    if png.mode == "P":  # OpenCV has painted the indices; Pillow keeps them, but leaves missing rows black
        with _damage_named(file):
            return np.array(png)
    if is_flat:
        return values // (255 // (2**depth - 1))  # values of few bits are spread over 0..255
    opaque = values.ndim == 3 and (values.shape[2] == 3 or (values[..., 3] == 255).all())
    if depth > 8 or png.mode == "LA" or not opaque:
        raise DataError(
            f"{file}: the label is {len(png.getbands())}-channel {values.dtype}; "
            "save it as a single-channel 8-bit PNG of class ids"
        )
    return np.ascontiguousarray(values[..., 2::-1])


def read_label_palette(file: Path) -> list[tuple[int, int, int]]:
    """RGB of each index of a palette PNG; empty for other label PNGs."""
    _, png = _label_png(file, _read_bytes(file))
    entries = png.palette.palette if png.palette else b""
    return list(zip(entries[0::3], entries[1::3], entries[2::3], strict=False))


def _label_png(file: Path, data: bytes) -> tuple[int, PngImageFile]:
    """A label's bits per channel, and the file, its pixels not read yet."""
    header = _header(file, data)
    if not header.kind:
        raise _damaged(file)
    if header.kind == "JPEG":
        raise DataError(f"{file}: the label is a JPEG, which changes ids; save it as a PNG")
    if header.kind != "PNG":
        raise DataError(f"{file}: the label is a {header.kind}; save it as an 8-bit PNG of class ids")
    return header.bits, _verified_png(file, data)


def _verified_png(file: Path, data: bytes) -> PngImageFile:
    """A PNG that is whole by its chunks' checksums."""
    with _damage_named(file):
        PngImageFile(io.BytesIO(data)).verify()
        return PngImageFile(io.BytesIO(data))


def _header(file: Path, data: bytes) -> Header:
    """What a file says of its pixels.

    Raises:
        DataError: it is broken, too large, or holds numbers that are no pixels, or what OpenCV misreads.
    """
    with _damage_named(file):
        header = read_header(io.BytesIO(data))
    if header.width * header.height > _PIXELS_PER_BYTE.get(header.kind, _INFLATED) * len(data):
        raise _damaged(file)
    if header.width * header.height > _MOST_PIXELS or max(header.width, header.height) > _LONGEST_SIDE:
        raise DataError(
            f"{file}: is {header.height}x{header.width} px, larger than OpenCV reads (2^30 pixels, a million "
            "a side); cut it into tiles"
        )
    if header.numbers != "unsigned" or header.bits > 16:
        raise DataError(
            f"{file}: is a {header.kind} of {header.bits}-bit {header.numbers} numbers, as tifffile or "
            "rasterio reads; scale the values to 0..65535 and save it with 16 bits per channel, unsigned"
        )
    if header.misread:
        raise DataError(
            f"{file}: is a TIFF of {header.misread}, which are not read here; save it in RGB, interleaved"
        )
    return header


def _decode_jpeg(file: Path, data: bytes) -> Image:
    """`[H, W, 3]` uint8 RGB; libjpeg's warnings are errors, as half of a photo may be grey."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        if "Corrupt JPEG data" in str(error) and _HARMLESS not in str(error):
            raise DataError(f"{file}: the JPEG is damaged ({error}); restore it from the original") from None
    with _damage_named(file):  # it is cut off, or whole and of a rare kind: Pillow tells these apart
        return np.array(JpegImageFile(io.BytesIO(data)).convert("RGB"))


def _decode(file: Path, data: bytes, flags: int) -> NDArray[Any]:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    except cv2.error:
        image = None
    if image is not None:
        return image
    if what := next((what for at, mark, what in _OTHERS if data[at : at + len(mark)] == mark), ""):
        raise DataError(f"{file}: is {what}, which is not read here; save it as PNG, JPEG or TIFF")
    raise _damaged(file)


def _is_heic(data: bytes) -> bool:
    """Whether it is a photo in HEIF's container coded by HEVC, as phones take them."""
    is_avif = b"avif" in data[8:64]  # its container may be HEIF's, too; OpenCV reads it
    return data[4:8] == b"ftyp" and data[8:12] in _HEIC and not is_avif


def _read_heic(file: Path, data: bytes) -> Image:
    """`[H, W, 3]` uint8 RGB, upright: HEIC's container says itself how it is turned.

    Raises:
        DataError: Pillow's plugin for it is not installed, or the file is damaged.
    """
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise DataError(
            f"{file}: is a HEIC photo; to read it, pip install pillow-heif, or save it as JPEG"
        ) from None
    register_heif_opener()
    with _damage_named(file), PIL.Image.open(io.BytesIO(data)) as photo:
        return np.array(photo.convert("RGB"), np.uint8)


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
    """For what Pillow reads: each of its plugins has errors of its own."""
    try:
        yield
    except MemoryError:
        raise
    except Exception:
        raise _damaged(file) from None


def _damaged(file: Path) -> DataError:
    return DataError(f"{file}: truncated, corrupt or not an image; restore it from the original dataset")
