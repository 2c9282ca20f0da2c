"""Damaged image and label files: each is read right, or refused in one line that names it.

`run` counts outcomes; docs/reliability.md's table is made of them.
"""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sparse_seg.data.reading import read_image, read_label
from sparse_seg.errors import DataError
from tests.data.files import PALETTE, chunk, palette, png
from tests.fuzz.damage import ANY

OUTCOMES = ("right", "refused", "traceback", "wrong", "without_checksum")
"""`without_checksum`: other pixels than before the damage, which a JPEG, BMP, TIFF or WebP cannot tell."""

Rng = np.random.Generator
Case = tuple[str, bytes, Any, bool]  # suffix, content, values (None: only refusing is right), checksum

_SUFFIXES = (".png", ".png", ".jpg", ".jpg", ".bmp", ".tif", ".webp")


def run(seed: int, count: int) -> dict[str, int]:
    """Try `count` damaged files; how many there were and how many had each outcome."""
    result = {"tried": 0} | dict.fromkeys(OUTCOMES, 0)
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            is_label = index % 2 == 1
            suffix, content, expected, checksum = _label(rng) if is_label else _image(rng)
            file = Path(folder, f"{index}{suffix}")
            file.write_bytes(content)
            outcome = _outcome(read_label if is_label else read_image, file, expected, checksum)
            result["tried"] += 1
            result[outcome] += 1
    return result


def _outcome(read: Callable[[Path], Any], file: Path, expected: Any, checksum: bool) -> str:
    try:
        values = read(file)
    except DataError as error:
        message = str(error)
        return "refused" if str(file) in message and "\n" not in message else "wrong"
    except Exception:
        return "traceback"
    if expected is not None and np.array_equal(values, expected):
        return "right"
    return "wrong" if checksum else "without_checksum"


def _scene(rng: Rng) -> np.ndarray:
    height, width = rng.integers(8, 80, 2)
    noise = rng.integers(0, 256, (height, width, 3), np.uint8)
    return np.asarray(cv2.GaussianBlur(noise, (0, 0), 1.5))


def _image(rng: Rng) -> Case:
    scene = _scene(rng)
    suffix = str(rng.choice(_SUFFIXES))
    if rng.random() < 0.15:  # deep pictures
        bits = int(rng.choice([12, 16]))
        scene[0, 0] = 255
        deep = scene.astype(np.uint16) << (bits - 8)
        return ".png", cv2.imencode(".png", deep)[1].tobytes(), scene[..., ::-1], True
    whole = cv2.imencode(suffix, scene)[1].tobytes()
    before = cv2.imdecode(np.frombuffer(whole, np.uint8), cv2.IMREAD_COLOR)
    assert before is not None
    content, same = _damaged(whole, rng)
    return suffix, content, before[..., ::-1] if same else None, suffix == ".png"


def _label(rng: Rng) -> Case:
    depth, colour = int(rng.choice([1, 2, 4, 8])), int(rng.choice([0, PALETTE]))
    ids = rng.integers(0, 2**depth, rng.integers(1, 80, 2)).astype(np.uint8)
    extra = palette([tuple(rng.integers(0, 256, 3)) for _ in range(2**depth)]) if colour else b""
    whole = png(ids, depth, colour, extra)
    kind = rng.random()
    if kind < 0.2:
        return ".png", whole, ids, True
    if kind < 0.3:  # kinds that hold no ids
        form = rng.choice(["grey alpha", "transparent", "16 bits", "jpeg"])
        pixels = np.dstack([ids] * {"grey alpha": 2, "transparent": 4}.get(form, 1)) // 2
        if form == "grey alpha":
            header = whole[16:25] + b"\x04" + whole[26:29]
            return ".png", whole[:8] + chunk(b"IHDR", header) + whole[33:], None, True
        if form == "16 bits":
            pixels = pixels.astype(np.uint16)
        return ".png", cv2.imencode(".jpg" if form == "jpeg" else ".png", pixels)[1].tobytes(), None, True
    content, same = _damaged(whole, rng)
    return ".png", content, ids if same else None, True


def _damaged(whole: bytes, rng: Rng) -> tuple[bytes, bool]:
    """Other content, and whether its pixels may still be read as they were."""
    kind = rng.choice(["any", "any", "any", "any", "behind", "size", "chunks", "other"])
    if kind == "behind":
        return whole + rng.bytes(int(rng.integers(1, 3 * len(whole)))), True
    if kind == "other":
        others = [b"", b"not an image", b"%PDF-1.7\n", b"\0\0\0\x18ftypmp42" + whole, b"\x89PNG", whole[8:]]
        return others[int(rng.integers(len(others)))], False
    if kind != "any" and whole.startswith(b"\x89PNG"):
        return (_other_size if kind == "size" else _other_chunks)(whole, rng)
    if kind != "any" and whole.startswith(b"\xff\xd8"):
        frame = whole.index(b"\xff\xc0") + 5
        return whole[:frame] + rng.bytes(4) + whole[frame + 4 :], False
    damage = ANY[int(rng.integers(len(ANY)))]
    return damage(whole, random.Random(int(rng.integers(2**32)))), True


def _other_size(whole: bytes, rng: Rng) -> tuple[bytes, bool]:
    """A header of a greater size, its checksum right."""
    width, height = (int.from_bytes(whole[at : at + 4]) for at in (16, 20))
    factor = int(rng.choice([2, 100, 10**4, 10**7]))
    other = height * int(rng.choice([1, factor]))
    size = ((width * factor) % 2**32).to_bytes(4) + (other % 2**32).to_bytes(4)
    return whole[:8] + chunk(b"IHDR", size + whole[24:29]) + whole[33:], False


def _other_chunks(whole: bytes, rng: Rng) -> tuple[bytes, bool]:
    """Chunks left out, doubled or in another order, each whole."""
    chunks, position = [], 8
    while position < len(whole):
        end = position + 12 + int.from_bytes(whole[position : position + 4])
        chunks.append(whole[position:end])
        position = end
    index = int(rng.integers(len(chunks)))
    kind = rng.choice(["without", "twice", "moved"])
    if kind == "without":
        del chunks[index]
    elif kind == "twice":
        chunks.insert(index, chunks[index])
    else:
        chunks.insert(int(rng.integers(len(chunks))), chunks.pop(index))
    return whole[:8] + b"".join(chunks), True


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files_are_read_right_or_refused(seed: int) -> None:
    result = run(seed, 600)
    assert result["tried"] == 600
    assert result["traceback"] == result["wrong"] == 0, result
    assert result["right"] > 50
    assert result["refused"] > 300
