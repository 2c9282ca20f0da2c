"""Losses of the learned mask. Both run the network dense, where a block's fine and coarse values exist (P1).

`straight_through`: end to end. The head reads, block by block, fine features or interpolated coarse ones as
the net chooses; the segmentation loss flows to the choice, a budget loss holds the share of fine blocks.
`supervised`: no labels, no choice. The net learns how much of a block's prediction the fine network changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.masks import LearnedPolicy, block_mean, straight_through
from sparse_seg.models.segmentor import Outputs, SelectiveSegmentor
from sparse_seg.sparse import densify

Loss = Callable[[Outputs, Tensor], Tensor]


def mask_loss(
    model: SelectiveSegmentor, images: Tensor, labels: Tensor, loss: Loss, mode: str, budget_weight: float
) -> Tensor:
    """The loss of one step. The model's policy is a `LearnedPolicy`; supervised it may have three strides."""
    policy = model.policy
    assert isinstance(policy, LearnedPolicy)
    if mode == "supervised":
        return supervised_loss(model, policy, images)
    return straight_through_loss(model, policy, images, labels, loss, budget_weight)


def straight_through_loss(
    model: SelectiveSegmentor,
    policy: LearnedPolicy,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    budget_weight: float,
) -> Tensor:
    """Segmentation loss under the chosen mask + `budget_weight` x (share of fine blocks - fine_fraction)^2.

    The extra sites' features are those of the dense network: the exchange rule is left out.
    """
    layouts = model.dense_layouts(images, model.strides[0])
    features = model.backbone(images, layouts)
    chosen = straight_through(policy.feature_scores(model.mask_features(features, layouts)))
    head: Any = model.head
    fine = densify(head.neck(features[-1], layouts[-1]), layouts[-1])
    coarse_layout = model.selective_layouts(images, torch.zeros_like(chosen, dtype=torch.bool))[-1]
    lattice = fine[:, :, ::2, ::2].permute(0, 2, 3, 1).reshape(-1, fine.shape[1])
    coarse = densify(lattice, coarse_layout)
    height, width = fine.shape[2:]
    cells = chosen.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None, :height, :width]
    grid = coarse + cells * (fine - coarse)
    logits = model.upsample(head.decode(grid, layouts[-1].stride), images, layouts[-1])
    target = policy.fine_fraction or 0.0
    return loss(Outputs(logits, None), labels) + budget_weight * (chosen.mean() - target).square()


def supervised_loss(model: SelectiveSegmentor, policy: LearnedPolicy, images: Tensor) -> Tensor:
    """Binary cross-entropy of the scores with the share of each block's pixels whose class the dense fine
    network (the teacher) changes against the dense coarse one."""
    with torch.no_grad():
        layouts = model.dense_layouts(images, model.strides[0])
        early = model.backbone(images, layouts[: model.first_selective])
        fine, coarse = model.dense_classes(images, early)
        changed = block_mean((fine != coarse).float(), policy.block)
        features = model.mask_features(early, layouts)
    return F.binary_cross_entropy_with_logits(policy.feature_scores(features), changed)
