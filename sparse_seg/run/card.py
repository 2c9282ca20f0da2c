"""What a network's input and output mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparse_seg.data.palette import Colour, default_palette
from sparse_seg.data.transforms import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Card:
    """Class names, colours and the values that stand for the classes in label files, by train id; mean and
    std of the input, RGB in units of 0..1."""

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    ids: tuple[int, ...]
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    @classmethod
    def unnamed(cls, count: int) -> Card:
        """Of `count` classes of which nothing is known: `class 0` and so on, in PASCAL VOC's colours."""
        names = tuple(f"class {number}" for number in range(count))
        return cls(names, default_palette(count), tuple(range(count)))
