"""What a network's input and output mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparse_seg.data.class_file import Colour, default_palette
from sparse_seg.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from sparse_seg.run.images import MIN_SIZE

# measured with camvid-slim on resized frames of CamVid: pictures 1.25 times too large or too small lose up to
# 2.5 points of mIoU, twice too small 12, twice too large 4, and 4 times too large 30
NEAR = 1.25  # scales within this factor are left alone
MOST_ENLARGED = 2.0  # beyond, pictures have a blur that training did not show


@dataclass(frozen=True)
class Card:
    """Class names, colours and the values that stand for the classes in label files, by train id; mean and
    std of the input, RGB in units of 0..1.

    frame: height and width of the training frames, px, where they are known; else `at_most`: a size that
        they hardly exceed.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    ids: tuple[int, ...]
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    frame: tuple[int, int] | None = None
    at_most: tuple[int, int] | None = None

    @classmethod
    def unnamed(cls, count: int) -> Card:
        """Of `count` classes of which nothing is known: `class 0` and so on, in PASCAL VOC's colours."""
        names = tuple(f"class {number}" for number in range(count))
        return cls(names, default_palette(count), tuple(range(count)))

    def scale_for(self, height: int, width: int) -> float:
        """The factor on an image's sides that shows objects at about the size that training showed them at.

        It gives the image the area of the training frames: the run costs what a training frame costs,
        whichever way a photo is turned. It is 1 near that, at most `MOST_ENLARGED`, and leaves both sides at
        least `MIN_SIZE`.
        """
        known = self.frame or self.at_most
        if known is None:
            return 1.0
        factor = math.sqrt(math.prod(known) / (height * width))
        factor = min(factor, MOST_ENLARGED if self.frame else 1.0)
        factor = max(factor, min(1.0, MIN_SIZE / min(height, width)))
        return 1.0 if 1 / NEAR <= factor <= NEAR else factor
