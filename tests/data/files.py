"""Image files that no library at hand writes: PNGs of any bit depth with any chunks; photos on their side."""

import struct
import zlib

import cv2
import numpy as np

from sparse_seg.data.formats import GREY, PNG_SIGNATURE


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(values: np.ndarray, depth: int, colour: int = GREY, extra: bytes = b"") -> bytes:
    """A PNG of grey values or palette indices `[H, W]`, `depth` bits each."""
    height, width = values.shape
    bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
    rows = np.packbits(bits.reshape(height, -1), axis=1)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return PNG_SIGNATURE + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def palette(colours: list[tuple[int, int, int]]) -> bytes:
    """A palette's chunk."""
    return chunk(b"PLTE", bytes(value for colour in colours for value in colour))


def sideways_photo(image: np.ndarray) -> bytes:
    """A JPEG of pixels `[H, W, 3]` RGB as phones store them, to be turned 90 degrees clockwise (EXIF 6)."""
    jpeg = cv2.imencode(".jpg", image[..., ::-1])[1].tobytes()
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
