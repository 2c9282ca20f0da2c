"""Cross-entropy over labelled pixels, optionally class-weighted or on hard pixels only."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.data.dataset import IGNORE_INDEX
from sparse_seg.models.segmentor import Outputs
from sparse_seg.schema import LossConfig


class SegmentationLoss(nn.Module):
    """Loss of a network's `Outputs` against labels `[B, H, W]`, the auxiliary head's added with its weight.

    A batch without a labelled pixel has loss 0.
    """

    weights: Tensor | None

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        weights = config.class_weights
        tensor = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.register_buffer("weights", tensor, persistent=False)
        self.ohem_threshold, self.ohem_min_kept = config.ohem_threshold, config.ohem_min_kept
        self.auxiliary_weight = config.auxiliary_weight

    def forward(self, outputs: Outputs, labels: Tensor) -> Tensor:
        loss = self._cross_entropy(outputs.logits, labels)
        if outputs.auxiliary is not None:
            loss = loss + self.auxiliary_weight * self._cross_entropy(outputs.auxiliary, labels)
        return loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.ohem_threshold is not None:
            losses = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
            return hard_pixel_mean(losses[labels != IGNORE_INDEX], self.ohem_threshold, self.ohem_min_kept)
        total = F.cross_entropy(logits, labels, self.weights, ignore_index=IGNORE_INDEX, reduction="sum")
        labelled = labels[labels != IGNORE_INDEX]
        weight = labelled.numel() if self.weights is None else self.weights[labelled].sum()
        return total / max(weight, 1e-12)


def hard_pixel_mean(losses: Tensor, threshold: float, min_kept: float) -> Tensor:
    """Online hard example mining (Shrivastava et al., CVPR 2016): mean loss of the hard pixels of `[P]`.

    Hard are pixels whose true class has a probability below `threshold`, but at least the `min_kept` share.
    """
    if losses.numel() == 0:
        return losses.sum()
    hard = losses[losses > -math.log(threshold)]
    least = math.ceil(min_kept * losses.numel())
    if hard.numel() < max(least, 1):
        hard = losses.topk(max(least, 1)).values
    return hard.mean()  # no topk where it is not needed: over a million pixels it costs more than the loss
