"""Blocks where the coarse network is uncertain."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.masks.base import MaskPolicy, PolicyInput, one_of
from sparse_seg.masks.oracle import label_boundary


class ConfidencePolicy(MaskPolicy):
    """A block's score is the uncertainty of the coarse network's own prediction in it; nothing is learned.

    It reads the logits of a coarse pass, which the run then refines.

    Args:
        uncertainty: `entropy` of the class probabilities over its largest value, log K; `margin`, one minus
            the difference of the two largest; `boundary`, 1 where the predicted class differs from a
            neighbour's. All lie in 0..1. What each is worth is in docs/masks.md.
        reduce: the `max` or the `mean` over the block.
        neighbours: whether a block's score is the largest of its own and its 8 neighbours'.
        stored_dtype: what a coarse pass keeps its activations in; None keeps them as they are.
    """

    OPTIONS: ClassVar[dict[str, str]] = {
        name: name for name in ("uncertainty", "reduce", "neighbours", "stored_dtype")
    }
    ranks_refinement = True
    sample = 4  # px between the places of a block at which the uncertainty is looked at

    def __init__(
        self,
        *cut: float | None,
        uncertainty: str = "entropy",
        reduce: str = "max",
        neighbours: bool = False,
        stored_dtype: torch.dtype | str | None = None,
        **levels: Any,
    ) -> None:
        super().__init__(*cut, **levels)
        self.uncertainty = one_of("uncertainty", "uncertainty", uncertainty)
        self.reduce, self.neighbours = one_of("reduction", "reduce", reduce), neighbours
        self.stored_dtype = getattr(torch, stored_dtype) if isinstance(stored_dtype, str) else stored_dtype

    def scores(self, run: PolicyInput) -> Tensor:
        return self.logit_scores(run.coarse_logits(self.sample, self.stored_dtype))

    @torch.no_grad()
    def logit_scores(self, logits: Tensor) -> Tensor:
        """Logits `[B, K, ceil(H/sample), ceil(W/sample)]` to scores `[B, ceil(H/block), ceil(W/block)]`."""
        pool = F.max_pool2d if self.reduce == "max" else F.avg_pool2d
        scores = pool(self._uncertainty(logits.float())[:, None], self.block // self.sample, ceil_mode=True)
        if self.neighbours:
            scores = F.max_pool2d(scores, 3, stride=1, padding=1)
        return scores.squeeze(1)

    def _uncertainty(self, logits: Tensor) -> Tensor:
        """`[B, K, h, w]` to `[B, h, w]`."""
        if self.uncertainty == "boundary":
            return label_boundary(logits.max(1).indices, ignore_index=-1).float()
        if self.uncertainty == "entropy":
            return entropy(logits) / math.log(logits.shape[1])
        probabilities = logits.softmax(1)
        first = probabilities.max(1, keepdim=True)  # two maxima are several times faster than topk
        second = probabilities.scatter(1, first.indices, 0).max(1).values
        return 1 - (first.values.squeeze(1) - second)

    def extra_repr(self) -> str:
        neighbours = ", neighbours" if self.neighbours else ""
        return f"{super().extra_repr()}, {self.reduce} {self.uncertainty}{neighbours}"


def entropy(logits: Tensor) -> Tensor:
    """Of the class probabilities, nats: logits `[B, K, h, w]` to `[B, h, w]`.

    Sums over classes are products with ones, which runtimes spread over threads.
    """
    batch, classes, height, width = logits.shape
    flat = (logits - logits.amax(1, keepdim=True)).flatten(2)
    powers, ones = flat.exp(), logits.new_ones(1, classes)
    total = ones @ powers
    return (total.log() - ones @ (powers * flat) / total).view(batch, height, width)
