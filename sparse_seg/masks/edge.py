"""Blocks with strong edges in the image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparse_seg.masks.base import BLOCK, MaskPolicy


class EdgePolicy(MaskPolicy):
    """A block's score is its strongest gradient: the largest Sobel magnitude of the grey normalised image.

    The magnitude is in units of the normalised image per pixel (Sobel divided by its gain of 8).
    """

    def scores(self, images: Tensor, labels: Tensor | None) -> Tensor:
        return F.max_pool2d(gradient_magnitude(images), BLOCK, ceil_mode=True).squeeze(1)


def gradient_magnitude(images: Tensor) -> Tensor:
    """`[B, 3, H, W]` to `[B, 1, H, W]`: Sobel magnitude of the channel mean, borders replicated."""
    grey = F.pad(images.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    # separable Sobel by slices: a single-channel convolution would be slower
    smooth_y = grey[:, :, :-2] + 2 * grey[:, :, 1:-1] + grey[:, :, 2:]
    smooth_x = grey[..., :-2] + 2 * grey[..., 1:-1] + grey[..., 2:]
    dx = (smooth_y[..., 2:] - smooth_y[..., :-2]) / 8
    dy = (smooth_x[:, :, 2:] - smooth_x[:, :, :-2]) / 8
    return (dx * dx + dy * dy).sqrt_()
