"""Losses of the learned mask. Both run the network dense, where a block's fine and coarse values exist (P1).

`straight_through`: end to end. What stands behind the rows reads, block by block, fine values or interpolated
coarse ones as the net chooses; the segmentation loss flows to the choice, a budget loss holds the share of
fine blocks.
`supervised`: no labels, no choice. The net learns how much of a block's prediction the fine network changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.masks import block_mean, straight_through
from sparse_seg.run.exits import blended_logits
from sparse_seg.run.passes import Pass
from sparse_seg.training.losses import Outputs

Loss = Callable[[Outputs, Tensor], Tensor]


def mask_loss(run: Pass, labels: Tensor, loss: Loss, mode: str, budget_weight: float) -> Tensor:
    """The loss of one step of the pass's own policy, a trained one; supervised it may have three strides."""
    if mode == "supervised":
        return supervised_loss(run)
    return straight_through_loss(run, labels, loss, budget_weight)


def straight_through_loss(run: Pass, labels: Tensor, loss: Loss, budget_weight: float) -> Tensor:
    """Segmentation loss under the chosen mask + `budget_weight` x (share of fine blocks - fine_fraction)^2.

    Extra sites get the dense network's features, without the exchange rule.
    """
    policy = run.model.policy
    chosen = straight_through(policy.scores(run))
    logits, target = blended_logits(run, chosen), policy.fine_fraction or 0.0
    return loss(Outputs(logits, None), labels) + budget_weight * (chosen.mean() - target).square()


def supervised_loss(run: Pass) -> Tensor:
    """Binary cross-entropy of the scores with the share of each block's pixels whose class the dense fine
    network (the teacher) changes against the dense coarse one."""
    with torch.no_grad():
        run.features()
        fine, coarse = run.dense_classes()
        changed = block_mean((fine != coarse).float(), run.model.policy.block)
    return F.binary_cross_entropy_with_logits(run.model.policy.scores(run), changed)
