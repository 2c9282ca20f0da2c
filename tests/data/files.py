"""Files to read: CamVid's folders; PNGs of any bit depth with any chunks, photos on their side, TIFFs."""

import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

GREY, PALETTE = 0, 3  # kinds of PNGs
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write(file: Path, content: np.ndarray | bytes | str) -> None:
    """A picture (BGR, if it has colours), bytes or a text, and the folders around it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, np.ndarray):
        assert cv2.imwrite(str(file), content)
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


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


def scene(height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture `[H, W, 3]` uint8."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 2))


def camvid(root: Path, *labels: np.ndarray, split: str = "train") -> Path:
    """A split in CamVid's folders: `0.png` and so on, labels `[H, W]` with pictures of their size."""
    for index, label in enumerate(labels):
        write(root / split / f"{index}.png", scene(*label.shape))
        write(root / f"{split}annot" / f"{index}.png", label)
    return root


def jpeg(height: int = 48, width: int = 64) -> bytes:
    return cv2.imencode(".jpg", scene(height, width))[1].tobytes()


def damaged_jpeg(height: int = 48, width: int = 64) -> bytes:
    """Other bytes in the middle of the coded pixels."""
    data = jpeg(height, width)
    middle = len(data) * 2 // 3
    noise = np.random.default_rng(0).integers(0, 255, 60, np.uint8).tobytes()
    return data[:middle] + noise + data[middle + 60 :]


def turn_by_exif(jpeg: bytes) -> bytes:
    """The JPEG, to be turned 90 degrees clockwise (EXIF 6)."""
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def sideways_photo(image: np.ndarray) -> bytes:
    """A JPEG of pixels `[H, W, 3]` RGB as phones store them, to be turned 90 degrees clockwise."""
    return turn_by_exif(cv2.imencode(".jpg", image[..., ::-1])[1].tobytes())


_TURNS: dict[int, Any] = {
    1: lambda pixels: pixels,
    2: np.fliplr,
    3: lambda pixels: pixels[::-1, ::-1],
    4: np.flipud,
    5: np.transpose,
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].T,
    8: np.rot90,
}


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels `[H, W]` as a viewer shows them."""
    return _TURNS[orientation](pixels)


def tiff(pixels: np.ndarray, orientation: int = 1, order: Literal["<", ">"] = "<") -> bytes:
    """An uncompressed grey TIFF of pixels `[H, W]` in their own dtype; `order` is `<` or `>`."""
    height, width = pixels.shape
    data, kind = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes(), "uif".index(pixels.dtype.kind)
    entries = (
        *((256, 4, width), (257, 4, height), (258, 3, 8 * pixels.itemsize), (259, 3, 1), (262, 3, 1)),
        *((273, 4, 8), (274, 3, orientation), (277, 3, 1), (278, 4, height), (279, 4, len(data))),
        (339, 3, kind + 1),
    )
    table = struct.pack(f"{order}H", len(entries))
    for tag, form, value in entries:
        table += struct.pack(f"{order}HHI", tag, form, 1)
        table += struct.pack(f"{order}{'HH' if form == 3 else 'I'}", *((value, 0) if form == 3 else (value,)))
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return mark + struct.pack(f"{order}I", 8 + len(data)) + data + table + bytes(4)


def huge_png(height: int, width: int) -> bytes:
    """A whole 1-bit PNG, all black."""
    packer, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
