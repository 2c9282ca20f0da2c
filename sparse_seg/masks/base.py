"""What every mask policy shares: score blocks, then cut by a threshold or a budget."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCK = 16  # pixels a block's side covers: one cell of the stride-16 grid


class MaskPolicy(nn.Module):
    """Chooses fine blocks from images: a subclass gives `scores`, this class cuts them.

    Args:
        fine_fraction: share of blocks in 0..1; exactly `round(fine_fraction * blocks)` per image become fine,
            those of the highest scores (ties: in raster order).
        threshold: blocks with a score above it become fine. Give one of the two.

    Raises:
        ValueError: both or neither given, or a fraction outside 0..1.
    """

    def __init__(self, fine_fraction: float | None = None, threshold: float | None = None) -> None:
        super().__init__()
        if (fine_fraction is None) == (threshold is None):
            raise ValueError("give a mask policy either fine_fraction or threshold")
        if fine_fraction is not None and not 0 <= fine_fraction <= 1:
            raise ValueError(f"fine_fraction must lie in 0..1, not {fine_fraction}")
        self.fine_fraction, self.threshold = fine_fraction, threshold

    def scores(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Images `[B, 3, H, W]` (and labels `[B, H, W]`) to scores `[B, ceil(H/16), ceil(W/16)]`."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The fine blocks: bool `[B, ceil(H/16), ceil(W/16)]`."""
        scores = self.scores(images, labels)
        if self.fine_fraction is not None:
            return top_blocks(scores, self.fine_fraction)
        assert self.threshold is not None
        return scores > self.threshold

    def extra_repr(self) -> str:
        if self.fine_fraction is None:
            return f"threshold={self.threshold}"
        return f"fine_fraction={self.fine_fraction}"


def top_blocks(scores: Tensor, fine_fraction: float) -> Tensor:
    """The `round(fine_fraction * h * w)` highest scores of each image `[B, h, w]`, as a bool mask."""
    flat = scores.flatten(1)
    count = round(fine_fraction * flat.shape[1])
    order = flat.argsort(dim=1, descending=True, stable=True)[:, :count]
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True)
    return chosen.view_as(scores)


def block_shape(images: Tensor) -> tuple[int, int, int]:
    """`(B, ceil(H/16), ceil(W/16))` of images `[B, C, H, W]`."""
    return images.shape[0], -(-images.shape[2] // BLOCK), -(-images.shape[3] // BLOCK)
