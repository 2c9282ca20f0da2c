"""Blocks with strong edges in the image."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from sparse_seg.masks.base import MaskPolicy, PolicyInput, block_shape, one_of

CAD_GREY, CAD_DILATION, CAD_STRIDE, CAD_BLOCK = (0.299, 0.587, 0.114), 11, 8, 32  # weights; px


class EdgePolicy(MaskPolicy):
    """A block's score is its strongest edge.

    Args:
        rule: `sobel`, the largest Sobel magnitude of the grey normalised image in the block, in units of the
            normalised image per pixel (Sobel divided by its gain of 8); or `cad`, see `cad_edges`, with which
            a score equal to the threshold counts, too (published thresholds: 0.15, 0.35, 0.95).
    """

    OPTIONS: ClassVar[dict[str, str]] = {"edge": "rule"}

    def __init__(self, *cut: float | None, rule: str = "sobel", **levels: Any) -> None:
        super().__init__(*cut, **levels)
        self.rule = one_of("edge rule", "edge", rule)

    def scores(self, run: PolicyInput) -> Tensor:
        images = run.images
        if self.rule == "sobel":
            return F.max_pool2d(gradient_magnitude(images), self.block, ceil_mode=True).squeeze(1)
        scores = cad_edges(images).repeat_interleave(CAD_BLOCK // self.block, 1)
        _, height, width = block_shape(images, self.block)
        return scores.repeat_interleave(CAD_BLOCK // self.block, 2)[:, :height, :width]

    def reaches(self, scores: Tensor, threshold: float) -> Tensor:
        return scores >= threshold if self.rule == "cad" else scores > threshold

    def extra_repr(self) -> str:
        return super().extra_repr() + (", rule=cad" if self.rule == "cad" else "")


def gradient_magnitude(images: Tensor) -> Tensor:
    """`[B, 3, H, W]` to `[B, 1, H, W]`: Sobel magnitude of the channel mean, borders replicated."""
    grey = F.pad(images.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    # separable Sobel by slices: a single-channel convolution would be slower
    smooth_y = grey[:, :, :-2] + 2 * grey[:, :, 1:-1] + grey[:, :, 2:]
    smooth_x = grey[..., :-2] + 2 * grey[..., 1:-1] + grey[..., 2:]
    dx = (smooth_y[..., 2:] - smooth_y[..., :-2]) / 8
    dy = (smooth_x[:, :, 2:] - smooth_x[:, :, :-2]) / 8
    return (dx * dx + dy * dy).sqrt_()


def cad_edges(images: Tensor) -> Tensor:
    """`[B, 3, H, W]` to `[B, ceil(H/32), ceil(W/32)]`: the edge rule of CAD's published settings.

    The threshold at which CAD (Hesse et al., CVPRW 2023, code visinf/cad) would call a block of 4x4 stride-8
    cells fine: luma of the normalised image; signed differences between next but one pixels to the right and
    below, zero outside the image (so bright borders count); the largest within 11x11 px; read at every 8th
    pixel; the largest of the 4x4.
    """
    weights = images.new_tensor(CAD_GREY).view(3, 1, 1)
    grey = F.pad((images * weights).sum(1, keepdim=True), (1, 1, 1, 1))
    dx = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
    dy = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
    dilated = F.max_pool2d(dx.maximum(dy), CAD_DILATION, stride=CAD_STRIDE, padding=CAD_DILATION // 2)
    _, height, width = block_shape(images, CAD_STRIDE)
    return F.max_pool2d(dilated[..., :height, :width], CAD_BLOCK // CAD_STRIDE, ceil_mode=True).squeeze(1)
