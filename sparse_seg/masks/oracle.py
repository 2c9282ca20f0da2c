"""Blocks that hold label boundaries: an upper bound, for it reads the labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.masks.base import MaskPolicy


class OraclePolicy(MaskPolicy):
    """A block's score is the share of its pixels that touch a label boundary.

    A pixel touches one if one of its 4 neighbours has another label; pixels of `ignore_index` make none.
    """

    def __init__(
        self,
        fine_fraction: float | None = None,
        threshold: float | None = None,
        ignore_index: int = 255,
        **levels: Any,
    ) -> None:
        super().__init__(fine_fraction, threshold, **levels)
        self.ignore_index = ignore_index

    def scores(self, images: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError(
                "the oracle policy reads labels: call it with them and pass its mask as fine_blocks, "
                "or choose another policy"
            )
        return block_mean(label_boundary(labels, self.ignore_index).float(), self.block)


def label_boundary(labels: Tensor, ignore_index: int = 255) -> Tensor:
    """bool `[B, H, W]`: pixels one of whose 4 neighbours has another, known label."""
    boundary = torch.zeros_like(labels, dtype=torch.bool)
    for axis in (1, 2):
        first, second = (labels.narrow(axis, start, labels.shape[axis] - 1) for start in (0, 1))
        differs = (first != second) & (first != ignore_index) & (second != ignore_index)
        for start in (0, 1):
            boundary.narrow(axis, start, labels.shape[axis] - 1).logical_or_(differs)
    return boundary


def block_mean(values: Tensor, block: int) -> Tensor:
    """`[B, H, W]` to `[B, ceil(H/block), ceil(W/block)]`: sums over blocks / block^2, a cut block's too."""
    height, width = values.shape[1:]
    return F.avg_pool2d(F.pad(values, (0, -width % block, 0, -height % block))[:, None], block).squeeze(1)
