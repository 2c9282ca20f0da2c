"""The structure of PNG and JPEG files: where they end, whether they are whole, how the pixels are stored.

Decoders fill in what is missing in a damaged file, some versions of them silently. What is checked here costs
about a millisecond per megabyte.
"""

import re
import struct
import zlib
from dataclasses import dataclass

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
_CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
_DEPTHS = {GREY: (1, 2, 4, 8, 16), PALETTE: (1, 2, 4, 8)}  # of the others: 8, 16
INFLATION = 1032  # zlib makes at most so many bytes of one
_PIXELS_PER_BYTE = 512  # a JPEG's 8x8 block takes a bit or more

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # start of frame
_NEXT_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # in coded pixels: no stuffed zero, no restart


class DamagedError(ValueError):
    """The file is not whole, or promises more pixels than it can hold."""


@dataclass(frozen=True)
class Png:
    """A whole PNG file: what its header says, and its chunks' places (type, start, end) in the data."""

    data: bytes
    width: int
    height: int
    depth: int  # bits per channel
    colour: int  # GREY, RGB, PALETTE, GREY_ALPHA or RGBA
    interlaced: int
    chunks: tuple[tuple[bytes, int, int], ...]

    def palette(self) -> list[tuple[int, int, int]]:
        """RGB of each index; empty without a palette."""
        for kind, start, end in self.chunks:
            if kind == b"PLTE":
                entries = self.data[start + 8 : end - 4]
                return list(zip(entries[0::3], entries[1::3], entries[2::3], strict=False))
        return []

    def bare(self) -> bytes:
        """A PNG of the same values without anything that changes how they are shown: palette indices as grey,
        and neither transparency nor animation."""
        colour = GREY if self.colour == PALETTE else self.colour
        shape = (self.width, self.height, self.depth, colour, 0, 0, self.interlaced)
        header = b"IHDR" + struct.pack(">IIBBBBB", *shape)
        pixels = (self.data[start:end] for kind, start, end in self.chunks if kind in (b"IDAT", b"IEND"))
        return b"".join(
            (PNG_SIGNATURE, struct.pack(">I", 13), header, struct.pack(">I", zlib.crc32(header)), *pixels)
        )


def read_png(data: bytes) -> Png:
    """The structure of a PNG file up to its end; what follows is left out.

    Raises:
        DamagedError: cut off, a critical chunk's checksum is wrong, or the header is impossible.
    """
    view, position, kind = memoryview(data), len(PNG_SIGNATURE), b""
    chunks = []
    while kind != b"IEND":
        if position + 12 > len(data):
            raise DamagedError("cut off")
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            raise DamagedError("cut off")
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            raise DamagedError("wrong checksum")
        chunks.append((kind, position, end))
        position = end
    if chunks[0][0] != b"IHDR" or chunks[0][2] != len(PNG_SIGNATURE) + 25:
        raise DamagedError("no header")
    width, height, depth, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if colour not in _CHANNELS or depth not in _DEPTHS.get(colour, (8, 16)):
        raise DamagedError("impossible header")
    row = (width * depth * _CHANNELS[colour] + 7) // 8
    packed = sum(end - start - 12 for kind, start, end in chunks if kind == b"IDAT")
    if width == 0 or height == 0 or row * height > INFLATION * packed:
        raise DamagedError("impossible size")
    return Png(data[:position], width, height, depth, colour, interlaced, tuple(chunks))


def read_jpeg(data: bytes) -> tuple[bytes, int, int]:
    """A JPEG up to its end, its width and its height, px; phones put a film behind it.

    Raises:
        DamagedError: cut off, without a frame, or of an impossible size.
    """
    position, width, height = 2, 0, 0
    while True:
        marker = _NEXT_MARKER.search(data, position)
        if marker is None:
            raise DamagedError("cut off")
        code, position = data[marker.end() - 1], marker.end()
        if code == 0xD9:
            if not width:
                raise DamagedError("no frame")
            return data[:position], width, height
        if code == 0x01:  # the one other marker without a length
            continue
        if position + 2 > len(data):
            raise DamagedError("cut off")
        if code in _FRAMES and position + 7 <= len(data):
            height, width = struct.unpack_from(">HH", data, position + 3)
            if height * width > _PIXELS_PER_BYTE * len(data):
                raise DamagedError("impossible size")
        position += int.from_bytes(data[position : position + 2])
