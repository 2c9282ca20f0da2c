"""Blocks at random: the control that a policy has to beat."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_seg.masks.base import MaskPolicy, PolicyInput, block_shape


class RandomPolicy(MaskPolicy):
    """Scores uniform in 0..1: anew each time in training, by seed and shape alone in eval."""

    OPTIONS: ClassVar[dict[str, str]] = {"seed": "seed"}
    reads_image_alone: ClassVar[bool] = False

    def __init__(self, *cut: float | None, seed: int = 0, **levels: Any) -> None:
        super().__init__(*cut, **levels)
        self.seed = seed

    def scores(self, run: PolicyInput) -> Tensor:
        images = run.images
        generator = None if self.training else torch.Generator().manual_seed(self.seed)
        return torch.rand(block_shape(images, self.block), generator=generator).to(images.device)
