"""The loss of a training step: cross-entropy plus the terms that the config adds for light networks.

Distillation (`train.distill`) and emphasis on detail (`boundary_weight`, `fine_weight`, `coarse_weight` of
`train.loss`) work alone and together, for dense and selective training. With `coarse_distill_weight` the
coarse lattice learns from the whole network's own prediction of the same step, as the narrow networks in
"Universally Slimmable Networks" (Yu and Huang, ICCV 2019) do from the widest: inplace distillation.

A learned mask has losses of its own. Both run the network dense, where a block's fine and coarse values exist
(P1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.config import TrainConfig
from sparse_seg.errors import TrainingError
from sparse_seg.masks import block_mean, straight_through
from sparse_seg.run.exits import auxiliary_logits, blended_logits, last_exit, lattice_logits
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.passes import Pass
from sparse_seg.run.way import Way
from sparse_seg.training.distillation import Teacher, likeness_difference, logits_divergence
from sparse_seg.training.losses import SegmentationLoss


def training_way(config: TrainConfig, model: SelectiveNetwork) -> Way:
    """How a network runs in training and validation."""
    return Way.dense(config.output_stride or model.dense_stride) if config.network == "dense" else Way()


class Objective(nn.Module):
    """Loss of a network on a batch.

    Args:
        config: of the training.
        teacher: what `config.distill` names.
    """

    def __init__(self, config: TrainConfig, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.config, self.teacher = config, teacher
        self.loss = SegmentationLoss(config.loss)

    def forward(self, model: SelectiveNetwork, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of images `[B, 3, H, W]` and labels `[B, H, W]`."""
        config, run = self.config, model.start(images, labels)
        if model.policy.needs_net:
            if config.mask_loss == "supervised":  # it may have three strides
                return supervised_loss(run)
            return straight_through_loss(run, labels, self.loss, config.budget_weight)
        way, distills = training_way(config, model), self.teacher is not None
        weighs = config.loss.fine_weight > 0 or (distills and config.distill.fine_weight > 0)
        mask = model.policy(run) if way.is_dense and weighs else None
        run.follow(way)
        mask = run.mask if mask is None else mask
        fine = None if mask is None else model.fine_pixels(mask, images)
        coarse = lattice_logits(run) if config.loss.reads_coarse_logits else None
        loss = self.loss(run.logits(), labels, auxiliary_logits(run), coarse, fine)
        return loss if self.teacher is None else loss + self._distill(self.teacher, run, fine)

    def _distill(self, teacher: Teacher, run: Pass, fine: Tensor | None) -> Tensor:
        """fine: pixels `[B, H, W]` of fine blocks."""
        config, logits = self.config.distill, run.grid_logits()
        taught = teacher(run.images, run.output_stride, run.grid_stride)

        def weights(grid: Tensor, stride: int) -> Tensor:
            weights = torch.ones_like(grid[:, 0], dtype=torch.float32)
            if fine is not None:  # a cell lies in the block of the pixel at its place
                weights = weights + config.fine_weight * fine[:, ::stride, ::stride]
            return weights

        loss = config.logits_weight * logits_divergence(
            logits, taught.logits, weights(logits, run.grid_stride), config.temperature
        )
        if config.features_weight > 0:  # it waits for the GPU at each image
            grid, is_site = last_exit(run)
            if taught.features.shape[2:] != grid.tensor.shape[2:]:
                raise TrainingError(
                    f"train.distill.teacher gives features {list(taught.features.shape[2:])}, and the "
                    f"network {list(grid.tensor.shape[2:])}: choose another teacher, or set "
                    "train.distill.features_weight=0"
                )
            loss = loss + config.features_weight * likeness_difference(
                grid.tensor, taught.features, is_site, weights(grid.tensor, grid.stride)
            )
        return loss


def straight_through_loss(run: Pass, labels: Tensor, loss: SegmentationLoss, budget_weight: float) -> Tensor:
    """Segmentation loss under the chosen mask + `budget_weight` x (share of fine blocks - fine_fraction)^2.

    End to end: what stands behind the rows reads, block by block, fine values or interpolated coarse ones as
    the net chooses. Extra sites get the dense network's features, without the exchange rule.
    """
    policy = run.model.policy
    chosen = straight_through(policy.scores(run))
    logits, target = blended_logits(run, chosen), policy.fine_fraction or 0.0
    return loss(logits, labels) + budget_weight * (chosen.mean() - target).square()


def supervised_loss(run: Pass) -> Tensor:
    """Binary cross-entropy of the scores with the share of each block's pixels whose class the dense fine
    network (the teacher) changes against the dense coarse one. It reads no labels and makes no choice."""
    with torch.no_grad():
        run.features()
        fine, coarse = run.dense_classes()
        changed = block_mean((fine != coarse).float(), run.model.policy.block)
    return F.binary_cross_entropy_with_logits(run.model.policy.scores(run), changed)
