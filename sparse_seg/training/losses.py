"""Cross-entropy over labelled pixels: class-weighted, on hard pixels only, or stressed where detail is."""

from __future__ import annotations

import math
from collections.abc import Callable

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


class SegmentationLoss(nn.Module):
    """Loss of logits `[B, K, H, W]` against labels `[B, H, W]`.

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
        logits: Tensor,
        labels: Tensor,
        auxiliary: Tensor | None = None,
        coarse: Tensor | None = None,
        fine_pixels: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            auxiliary: logits of the auxiliary head, whose loss counts `auxiliary_weight`.
            coarse: logits of the coarse lattice alone, whose loss counts `coarse_weight`, and their
                divergence from `logits` `coarse_distill_weight`.
            fine_pixels: bool `[B, H, W]`, the pixels of fine blocks, which count `1 + fine_weight`.
        """
        config = self.config
        loss = self._cross_entropy(logits, labels, self._emphasis(labels, fine_pixels))
        if auxiliary is not None:
            loss = loss + config.auxiliary_weight * self._cross_entropy(auxiliary, labels)
        if coarse is not None and config.coarse_weight > 0:
            loss = loss + config.coarse_weight * self._cross_entropy(coarse, labels)
        if coarse is not None and config.coarse_distill_weight > 0:
            loss = loss + config.coarse_distill_weight * self._divergence(coarse, logits, labels)
        return loss

    def _divergence(self, coarse: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """Inplace distillation: the mean Kullback-Leibler divergence from the network's own prediction."""
        labelled = (labels != IGNORE_INDEX).float()
        total = (divergence(coarse, logits.detach()) * labelled).sum()
        return total / self.across(labelled.sum()).clamp_min(1e-12)

    def _emphasis(self, labels: Tensor, fine_pixels: Tensor | None) -> Tensor | float:
        """Weights `[B, H, W]` of pixels; 1 where all count alike."""
        config = self.config
        emphasis: Tensor | float = 1.0
        if config.boundary_weight > 0:
            emphasis = emphasis + config.boundary_weight * near_boundary(labels, config.boundary_width)
        if config.fine_weight > 0 and fine_pixels is not None:
            emphasis = emphasis + config.fine_weight * fine_pixels
        return emphasis

    def _cross_entropy(self, logits: Tensor, labels: Tensor, emphasis: Tensor | float = 1.0) -> Tensor:
        losses = F.cross_entropy(logits, labels, self.weights, ignore_index=IGNORE_INDEX, reduction="none")
        labelled = labels != IGNORE_INDEX
        if self.config.ohem_threshold is not None:
            hard = hard_pixels(losses[labelled], self.config.ohem_threshold, self.config.ohem_min_kept)
            return hard.sum() / self.across(hard.new_tensor(hard.numel())).clamp_min(1e-12)
        weights = labelled * emphasis
        if self.weights is not None:
            weights = weights * self.weights[labels.where(labelled, 0)]
        return (losses * emphasis).sum() / self.across(weights.sum()).clamp_min(1e-12)


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence `[B, h, w]` of the class probabilities of logits `[B, K, h, w]`."""
    own, taught = ((one.float() / temperature).log_softmax(1) for one in (student, teacher))
    return F.kl_div(own, taught, reduction="none", log_target=True).sum(1)


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
