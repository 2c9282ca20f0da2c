"""The loss of a training step: cross-entropy, and what the config adds against the loss of light networks.

Distillation (`train.distill`) and emphasis on detail (`boundary_weight`, `fine_weight`, `coarse_weight` of
`train.loss`) work alone and together, for dense and selective training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_seg.config import TrainConfig
from sparse_seg.masks import LearnedPolicy, block_levels
from sparse_seg.models.heads import RowHead
from sparse_seg.models.segmentor import GridOutputs, SelectiveSegmentor
from sparse_seg.sparse import SiteLayout, densify
from sparse_seg.training.distillation import Teacher, likeness_difference, logits_divergence
from sparse_seg.training.losses import SegmentationLoss
from sparse_seg.training.masks import mask_loss


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

    def forward(self, model: SelectiveSegmentor, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of images `[B, 3, H, W]` and labels `[B, H, W]`."""
        config = self.config
        if isinstance(model.policy, LearnedPolicy):
            return mask_loss(model, images, labels, self.loss, config.mask_loss, config.budget_weight)
        fine_blocks = model.choose(images, labels) if self._needs_blocks else None
        if config.network == "dense":
            layouts = model.dense_layouts(images, config.output_stride)
        else:
            layouts = model.selective_layouts(images, fine_blocks)
        features, layout = model.backbone(images, layouts), layouts[-1]
        if not isinstance(model.head, RowHead):
            grid = GridOutputs(features, layouts, model.grid_logits(features, layouts))
            outputs = model.finish(images, grid)
            return self.loss(outputs, labels, None, _pixels(model, fine_blocks, images))
        rows = model.head.neck(features[-1], layout)
        grid_logits = model.head.decode(densify(rows, layout), layout.stride)
        outputs = model.finish(images, GridOutputs(features, layouts, grid_logits))
        coarse = coarse_logits(model, images, rows, layout) if config.loss.coarse_weight > 0 else None
        loss = self.loss(outputs, labels, coarse, _pixels(model, fine_blocks, images))
        if self.teacher is not None:
            loss = loss + self._distill(model, images, rows, grid_logits, layout, fine_blocks)
        return loss

    @property
    def _needs_blocks(self) -> bool:
        """Whether the mask is used: by the layout, or by a weight."""
        distilled = self.teacher is not None and self.config.distill.fine_weight > 0
        return self.config.network == "selective" or self.config.loss.fine_weight > 0 or distilled

    def _distill(
        self,
        model: SelectiveSegmentor,
        images: Tensor,
        rows: Tensor,
        grid_logits: Tensor,
        layout: SiteLayout,
        fine_blocks: Tensor | None,
    ) -> Tensor:
        assert self.teacher is not None
        config, teacher = self.config.distill, self.teacher(images, layout.stride)
        weights = torch.ones(layout.batch, *layout.size, device=images.device)
        fine = _pixels(model, fine_blocks, images)
        if fine is not None:  # a cell lies in the block of the pixel at its place
            weights = weights + config.fine_weight * fine[:, :: layout.stride, :: layout.stride]
        logits = logits_divergence(grid_logits, teacher.logits, weights, config.temperature)
        features = likeness_difference(rows, teacher.features, layout, weights)
        return config.logits_weight * logits + config.features_weight * features


def coarse_logits(model: SelectiveSegmentor, images: Tensor, rows: Tensor, layout: SiteLayout) -> Tensor:
    """Logits `[B, K, H, W]` of the coarse lattice alone: what the head says if no block is fine.

    Args:
        rows: the neck's, `[N, C]`, of any layout; those of the lattice are read.
        layout: of the rows.
    """
    assert isinstance(model.head, RowHead)
    blocks = (layout.batch, *(-(-length // model.strides[-1]) for length in images.shape[2:]))
    all_coarse = torch.zeros(blocks, dtype=torch.bool, device=images.device)
    coarse = model.selective_layouts(images, all_coarse)[-1]
    places = layout.rows_at(coarse)
    lattice = rows if places is None else rows.index_select(0, places)
    grid = model.head.decode(densify(lattice, coarse), coarse.stride)
    return model.upsample(grid, images, coarse)


def _pixels(model: SelectiveSegmentor, fine_blocks: Tensor | None, images: Tensor) -> Tensor | None:
    """Blocks `[B, Hc, Wc]` to the pixels of those at the finest stride, bool `[B, H, W]`."""
    if fine_blocks is None:
        return None
    fine, block = block_levels(fine_blocks, model.strides) == len(model.strides) - 1, model.strides[-1]
    height, width = images.shape[2:]
    return fine.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :height, :width]
