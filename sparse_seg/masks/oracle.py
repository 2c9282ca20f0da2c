"""Blocks that full resolution would help most: upper bounds for other masks, using what those cannot know."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.masks.base import MaskPolicy, PolicyInput, one_of


class OraclePolicy(MaskPolicy):
    """A bound, not a saving: a block's score is read off the labels or off the whole dense network.

    Args:
        rule: `boundary`, the share of a block's pixels that touch a label boundary: one of their 4 neighbours
            has another label. `change`, the share whose class the dense network at the finest stride changes
            against the dense one at the coarsest; it needs no labels. `gain`, the share where the fine one is
            right and the coarse one wrong, minus the reverse. The last two run both dense networks, more
            than the mask can save.
        ignore_index: label of pixels that make no boundary and no gain.

    Shares are of a whole block's pixels, so one that the border cuts, or with few labels, has less to gain.
    """

    OPTIONS: ClassVar[dict[str, str]] = {"oracle": "rule"}
    is_bound = True

    def __init__(
        self, *cut: float | None, ignore_index: int = 255, rule: str = "boundary", **levels: Any
    ) -> None:
        super().__init__(*cut, **levels)
        self.ignore_index, self.rule = ignore_index, one_of("oracle rule", "oracle", rule)

    def scores(self, run: PolicyInput) -> Tensor:
        labels = run.labels
        if labels is None and self.rule != "change":
            raise ValueError(
                f"the oracle policy ({self.rule}) reads labels: give them (model.start(images, labels)), or "
                "choose another policy"
            )
        if labels is not None and self.rule == "boundary":
            return block_mean(label_boundary(labels, self.ignore_index).float(), self.block)
        return self.class_scores(*run.dense_classes(), labels)

    def class_scores(self, fine: Tensor, coarse: Tensor, labels: Tensor | None) -> Tensor:
        """Scores `[B, ceil(H/block), ceil(W/block)]` by `change` or `gain`.

        Args:
            fine, coarse: classes int64 `[B, H, W]` of the dense network at the finest and coarsest stride.
            labels: int64 `[B, H, W]`, which `gain` reads.
        """
        if self.rule == "change":
            return block_mean((fine != coarse).float(), self.block)
        assert labels is not None
        gain = (fine == labels).float() - (coarse == labels).float()
        return block_mean(gain * (labels != self.ignore_index), self.block)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.rule == "boundary" else f", rule={self.rule}")


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
