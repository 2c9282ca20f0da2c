"""Blocks where the network was uncertain in the frame before: a mask that costs no coarse pass."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_seg.masks.base import PolicyInput, block_shape
from sparse_seg.masks.confidence import ConfidencePolicy


class PreviousPolicy(ConfidencePolicy):
    """For a video: a block's score is the uncertainty of the last frame's result, which is there anyway.

    A first frame, one of another size, and images in training are scored by their own coarse pass, as
    `ConfidencePolicy` does; options are those of that policy. Evaluation takes images in order for a video.
    """

    reads_image_alone: ClassVar[bool] = False
    _last: Tensor | None = None

    def scores(self, run: PolicyInput) -> Tensor:
        if self.training or self._last is None or self._last.shape != block_shape(run.images, self.block):
            return super().scores(run)
        return self._last

    @torch.no_grad()
    def remember(self, run: Any) -> None:
        self._last = run and self.logit_scores(run.upsample(run.grid_logits(), self.sample))
