"""Cross-entropy over labelled pixels: class-weighted, on hard pixels only, or stressed where detail is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sparse_seg.config import LossConfig
from sparse_seg.data.dataset import IGNORE_INDEX
from sparse_seg.errors import ConfigError
from sparse_seg.masks import label_boundary

LEAST_WEIGHT = 1e-6  # that one class at least must have


class Outputs(NamedTuple):
    """Logits `[B, K, H, W]`, and those of the auxiliary head (None without one or outside training)."""

    logits: Tensor
    auxiliary: Tensor | None


class SegmentationLoss(nn.Module):
    """Loss of a network's `Outputs` against labels `[B, H, W]`, the auxiliary head's added with its weight.

    A batch without a labelled pixel has loss 0. Where several processes share a batch, `across` gives the
    mean over them of a loss's weight: the mean of their losses is then the loss of the whole batch.
    """

    weights: Tensor | None
    across: Callable[[Tensor], Tensor]

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        weights = config.class_weights
        tensor = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.register_buffer("weights", tensor, persistent=False)
        self.config, self.across = config, lambda weight: weight

    def forward(
        self,
        outputs: Outputs,
        labels: Tensor,
        coarse: Tensor | None = None,
        fine_pixels: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            coarse: logits `[B, K, H, W]` of the coarse lattice alone, whose loss counts `coarse_weight`, and
                their divergence from the outputs `coarse_distill_weight`.
            fine_pixels: bool `[B, H, W]`, the pixels of fine blocks, which count `1 + fine_weight`.
        """
        config, emphasis = self.config, self._emphasis(labels, fine_pixels)
        loss = self._cross_entropy(outputs.logits, labels, emphasis)
        if outputs.auxiliary is not None:
            loss = loss + config.auxiliary_weight * self._cross_entropy(outputs.auxiliary, labels)
        if coarse is not None and config.coarse_weight > 0:
            loss = loss + config.coarse_weight * self._cross_entropy(coarse, labels)
        if coarse is not None and config.coarse_distill_weight > 0:
            loss = loss + config.coarse_distill_weight * self._divergence(coarse, outputs.logits, labels)
        return loss

    def _divergence(self, coarse: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Inplace distillation: the mean Kullback-Leibler divergence from the network's own prediction."""
        labelled = (labels != IGNORE_INDEX).float()
        own, taught = coarse.float().log_softmax(1), logits.detach().float().log_softmax(1)
        divergence = F.kl_div(own, taught, reduction="none", log_target=True).sum(1)
        return (divergence * labelled).sum() / self.across(labelled.sum()).clamp_min(1e-12)

    def _emphasis(self, labels: Tensor, fine_pixels: Tensor | None) -> Tensor | None:
        """Weights `[B, H, W]` of pixels; None where all count alike."""
        config, weights = self.config, None
        if config.boundary_weight > 0:
            near = near_boundary(labels, config.boundary_width)
            weights = 1 + config.boundary_weight * near
        if config.fine_weight > 0 and fine_pixels is not None:
            weights = (1 if weights is None else weights) + config.fine_weight * fine_pixels
        return weights

    def _cross_entropy(self, logits: Tensor, labels: Tensor, emphasis: Tensor | None = None) -> Tensor:
        losses = F.cross_entropy(logits, labels, self.weights, ignore_index=IGNORE_INDEX, reduction="none")
        labelled = labels != IGNORE_INDEX
        if self.config.ohem_threshold is not None:
            hard = hard_pixels(losses[labelled], self.config.ohem_threshold, self.config.ohem_min_kept)
            return hard.sum() / self.across(hard.new_tensor(hard.numel())).clamp_min(1e-12)
        weights = labelled.float()
        if emphasis is not None:
            weights, losses = weights * emphasis, losses * emphasis
        if self.weights is not None:
            weights = weights * self.weights[labels.where(labelled, 0)]
        return losses.sum() / self.across(weights.sum()).clamp_min(1e-12)


def check_class_weights(pixels: NDArray[np.int64], weights: list[float] | None) -> None:
    """Raises a ConfigError where no class of the labelled pixels, `[K]` by class, has a weight."""
    if weights is not None and not (np.array(weights)[pixels > 0] >= LEAST_WEIGHT).any():
        raise ConfigError(
            f"train.loss.class_weights are all below {LEAST_WEIGHT} for the classes in the train labels: "
            "nothing would be learned; raise some"
        )


def near_boundary(labels: Tensor, width: int) -> Tensor:
    """bool `[B, H, W]`: pixels within `width` px (rows or columns) of a boundary between two known labels."""
    boundary = label_boundary(labels, IGNORE_INDEX)[:, None].float()
    reach = width - 1  # the two pixels at the boundary are within 1 px of it
    return F.max_pool2d(boundary, 2 * reach + 1, stride=1, padding=reach)[:, 0] > 0


def hard_pixels(losses: Tensor, threshold: float, min_kept: float) -> Tensor:
    """Online hard example mining (Shrivastava et al., CVPR 2016): the losses of the hard pixels of `[P]`.

    Hard are pixels whose true class has a probability below `threshold`, but at least the `min_kept` share.
    """
    hard = losses[losses > -math.log(threshold)]
    least = max(math.ceil(min_kept * losses.numel()), 1)
    if hard.numel() < least <= losses.numel():
        hard = losses.topk(least).values  # not where it is not needed: over a million pixels it costs more
    return hard
