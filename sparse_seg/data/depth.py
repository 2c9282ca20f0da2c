"""How many of 16 bits per channel the pictures of a data set or a folder use: one answer for all of them.

A camera of 12 bits often stores files of 16. Looked at one by one, a frame with one bright pixel would be
read 16 times darker than the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sparse_seg.data.headers import read_header
from sparse_seg.data.reading import decode_image, guessed_bits
from sparse_seg.errors import DataError

LOOKED_AT = 32
"""Files whose values are looked at, evenly spread; in the others, higher values are clipped."""

_CERTAIN = 1 << 14  # a value as high says that all 16 bits are used


class Depth(NamedTuple):
    """What `read_image` takes as its `bits`, and what to say of it where the files leave a choice."""

    bits: int | None
    note: str = ""


def find_depth(files: Sequence[Path], told: int | None, setting: str) -> Depth:
    """The bits that pictures of one unit use; files that cannot be read are left to whoever reads them.

    Args:
        told: by the user, who then decides.
        setting: how to tell, for the note.
    """
    if told is not None:
        return Depth(told)
    deep = [file for file in files if _is_open(file)]
    count = min(LOOKED_AT, len(deep))
    chosen = [deep[number * len(deep) // count] for number in range(count)]
    highest = max(map(_highest, chosen), default=0)
    if not highest:
        return Depth(None)
    bits = guessed_bits(highest)
    ceiling = (1 << bits) - 1 if bits < 16 else _CERTAIN - 1
    if highest > ceiling:
        return Depth(bits)
    some = f" in {count} of them" if count < len(deep) else ""
    return Depth(
        bits,
        f"{len(deep)} of {len(files)} images have 16 bits per channel but no value above {ceiling}{some}, "
        f"such as {deep[0].name}: all are read as {bits}-bit pictures; if they are of another depth, "
        f"{setting}",
    )


def _is_open(file: Path) -> bool:
    """Whether a file has 16 bits per channel and does not tell how many are used."""
    with suppress(OSError, ValueError):
        if file.is_file():  # a pipe may never end
            with file.open("rb") as stream:
                header = read_header(stream)
            return header.bits == 16 and header.told is None
    return False


def _highest(file: Path) -> int:
    try:
        return decode_image(file).highest
    except DataError:
        return 0
