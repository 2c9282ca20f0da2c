"""Blocks that hold label boundaries: an upper bound, for it reads the labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.masks.base import BLOCK, MaskPolicy


class OraclePolicy(MaskPolicy):
    """A block's score is the share of its pixels that touch a label boundary.

    A pixel touches one if one of its 4 neighbours has another label; pixels of `ignore_index` make none.
    """

    def __init__(
        self, fine_fraction: float | None = None, threshold: float | None = None, ignore_index: int = 255
    ) -> None:
        super().__init__(fine_fraction, threshold)
        self.ignore_index = ignore_index

    def scores(self, images: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError(
                "the oracle policy reads labels: call it with them and pass its mask as fine_blocks, "
                "or choose another policy"
            )
        height, width = labels.shape[1:]
        pad = (0, -width % BLOCK, 0, -height % BLOCK)
        boundary = F.pad(self._boundary(labels).float(), pad)
        return F.avg_pool2d(boundary[:, None], BLOCK).squeeze(1)

    def _boundary(self, labels: Tensor) -> Tensor:
        """bool `[B, H, W]`: pixels one of whose 4 neighbours has another, known label."""
        boundary = torch.zeros_like(labels, dtype=torch.bool)
        for axis in (1, 2):
            first, second = (labels.narrow(axis, start, labels.shape[axis] - 1) for start in (0, 1))
            differs = (first != second) & (first != self.ignore_index) & (second != self.ignore_index)
            for start in (0, 1):
                boundary.narrow(axis, start, labels.shape[axis] - 1).logical_or_(differs)
        return boundary
