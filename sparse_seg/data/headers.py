"""What an image file says of its pixels, read by Pillow without decoding them."""

from __future__ import annotations

import warnings
from typing import BinaryIO, NamedTuple

from PIL.BmpImagePlugin import BmpImageFile
from PIL.Image import Exif
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from PIL.WebPImagePlugin import WebPImageFile

# first bytes; not PIL.Image.open, whose limit of 179 megapixels refuses what phones take
_PLUGINS: dict[bytes, type[ImageFile]] = {
    b"\x89PNG": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"RIFF": WebPImageFile,
    b"BM": BmpImageFile,
    b"P": PpmImageFile,
}
_TIFF, _BIG_TIFF = (b"II*\0", b"MM\0*"), (b"II+\0", b"MM\0+")
# TIFF's tags; EXIF has the orientation
_WIDTH, _HEIGHT, _BITS, _COLOURS, _ORIENTATION, _NUMBERS = 256, 257, 258, 262, 274, 339
_CHANNELS, _PLANES, _EXTRA = 277, 284, 338
warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")  # of damaged tags: our error names the file
_KINDS = {1: "unsigned", 2: "signed", 3: "float"}
_RGB, _LAB = 2, (8, 9, 10)  # CIE's, ICC's and ITU's
_APART, _UNASSOCIATED = 2, 2  # each channel in a plane of its own; alpha that is not multiplied in


class Header(NamedTuple):
    """What a file says of its pixels."""

    kind: str = ""  # its format, of those that are known
    width: int = 0  # px, as stored
    height: int = 0
    bits: int = 8  # per channel, as stored
    numbers: str = "unsigned"  # or `signed`, `float`
    orientation: int = 1  # 1 to 8 as in EXIF
    told: int | None = None  # how many of 16 bits are used as OpenCV decodes them; None: only values tell
    misread: str = ""  # of what OpenCV makes other colours
    multiplies: bool = False  # whether OpenCV darkens what is transparent


def read_header(stream: BinaryIO) -> Header:
    """The header of a PNG, JPEG, WebP, TIFF, BMP or PNM; of another file without a kind.

    Raises:
        ValueError: it is broken.
    """
    start = stream.read(26)
    stream.seek(0)
    plugin = next((plugin for first, plugin in _PLUGINS.items() if start.startswith(first)), None)
    try:
        if start[:4] in _TIFF + _BIG_TIFF:
            return _tiff(stream, start)
        if plugin is None or start[8:12] == b"AVI ":  # a RIFF file, as WebP is
            return Header()
        image, bits, told = plugin(stream), 8, None
        if isinstance(image, PngImageFile):
            bits = start[24]
        elif isinstance(image, PpmImageFile):
            bits, told = _pnm_bits(image)
        exif = Exif()  # not image.getexif, which decodes a PNG's pixels
        exif.load(image.info.get("exif", b""))
        turn = int(exif.get(_ORIENTATION, 1))
        return Header(str(image.format), *image.size, bits, orientation=turn, told=told)
    except Exception:  # each plugin has errors of its own
        raise ValueError("broken header") from None


def _pnm_bits(image: PpmImageFile) -> tuple[int, int | None]:
    """Bits per channel, and how many are used by the highest value that the file names."""
    said = image.tile[0][3]  # how to decode: a raw mode, or one and the highest value
    highest = int(said[1]) if isinstance(said, tuple) else 65535 if said == "I;16B" else 255
    return (8, None) if highest < 256 else (16, highest.bit_length() if highest < 65535 else None)


def _tiff(stream: BinaryIO, start: bytes) -> Header:
    """Of its first picture, whatever its numbers: Pillow opens few kinds."""
    tags = ImageFileDirectory_v2(start[: 16 if start[:4] in _BIG_TIFF else 8])
    stream.seek(tags.next)
    tags.load(stream)
    numbers = _KINDS.get(tags.get(_NUMBERS, (1,))[0], "unsigned")
    size, bits = (int(tags[_WIDTH]), int(tags[_HEIGHT])), int(tags.get(_BITS, (1,))[0])
    told = 16 if 8 < bits < 16 else None  # OpenCV spreads them over 16 bits
    colours, planes = tags.get(_COLOURS), tags.get(_PLANES) == _APART and tags.get(_CHANNELS, 1) > 1
    misread = f"{bits}-bit channels in separate planes" if planes and bits > 8 else ""
    misread = "Lab colours" if colours in _LAB else misread
    multiplies = bits == 8 and colours == _RGB and tags.get(_EXTRA, (0,))[0] == _UNASSOCIATED
    orientation = int(tags.get(_ORIENTATION, 1))
    return Header("TIFF", *size, bits, numbers, orientation, told, misread, multiplies)
