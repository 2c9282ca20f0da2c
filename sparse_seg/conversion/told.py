"""What the caller of a conversion says of a network beside its file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sparse_seg.checkpoint import IMAGENET_MEAN, IMAGENET_STD
from sparse_seg.data.class_file import ClassFile
from sparse_seg.errors import CheckpointError


class Scaling(NamedTuple):
    """Of the input: mean and std, RGB in units of 0..1, and how they are known, in words."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    known: str = ""

    def __str__(self) -> str:
        mean, std = ([round(value, 6) for value in values] for values in (self.mean, self.std))
        return f"RGB in 0..1, mean {mean}, std {std} ({self.known or 'ImageNet, assumed'})"


def scaling_of(mean: Sequence[float] | None, std: Sequence[float] | None, otherwise: Scaling) -> Scaling:
    """What the caller says, where it gives both."""
    return otherwise if mean is None or std is None else Scaling(tuple(mean), tuple(std), "as told")


def check_classes(told: ClassFile | None, count: int | None, name: object) -> None:
    """Raises a CheckpointError where the caller names more or fewer classes than there are."""
    if told is not None and len(told.classes) != count:
        raise CheckpointError(
            f"{name} has {count or 'no'} classes, but {len(told.classes)} are given; name its own"
        )
