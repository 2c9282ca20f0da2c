"""What whoever starts passes predicts: a network, or its form in another runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from sparse_seg.masks import MaskPolicy
from sparse_seg.run.way import Way


class Predicting(ABC):
    """Logits and classes, by the passes that `start` gives."""

    @abstractmethod
    def start(self, images: Tensor, labels: Tensor | None = None) -> Any:
        """Start a pass over images, with `follow`, `take`, `logits`, `classes` and `mask`."""

    def forward(self, images: Tensor, fine_blocks: Tensor | None = None) -> Tensor:
        """Logits `[B, K, H, W]` of normalised images `[B, 3, H, W]`, any size from 32x32 up.

        Args:
            fine_blocks: `[B, ceil(H/s), ceil(W/s)]` for the coarsest stride s: bool, the blocks at the finest
                stride; or int64 levels, 0 for the coarsest stride up to the number of strides - 1 for the
                finest. By default the policy chooses.

        Raises:
            ValueError: images or mask of a wrong shape or dtype.
        """
        run = self.start(images)
        return (run.follow() if fine_blocks is None else run.take(fine_blocks)).logits()

    def dense(self, images: Tensor, output_stride: int = 8) -> Tensor:
        """Logits `[B, K, H, W]` of the same weights run dense at output stride 4, 8, 16 or 32."""
        return self.start(images).follow(Way.dense(output_stride)).logits()

    @torch.inference_mode()
    def classify(
        self,
        images: Tensor,
        output_stride: int | None = None,
        policy: MaskPolicy | None = None,
        labels: Tensor | None = None,
        fine_blocks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Classes int64 `[B, H, W]`, for less than by every pixel's logits, and the mask (None when dense).

        Args:
            output_stride: run dense at this stride; None: selective.
            policy: overrides the model's own; labels: see `start`.
            fine_blocks: the mask, where no policy is to choose it.

        Raises:
            ValueError: see `forward`; or both a stride and a mask.
        """
        if output_stride is not None and fine_blocks is not None:
            raise ValueError("a dense run has no mask: give output_stride or fine_blocks")
        run = self.start(images, labels)
        if fine_blocks is not None:
            run.take(fine_blocks)
        else:
            run.follow(Way(output_stride), policy)
        return run.classes(), run.mask
