"""Bilinear upsampling of logits that keeps the offset the network was trained with."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample_logits(
    logits: Tensor,
    size: tuple[int, int],
    stride: int,
    trained_stride: int,
    align_corners: bool = False,
    every: int = 1,
) -> Tensor:
    """Logits `[B, K, h, w]` at `stride` px to `[B, K, H, W]`, or to one pixel of each `every` x `every`, that
    in their middle, a square cut by the border included.

    Sites sit at multiples of their stride. A network trained with half-pixel upsampling at output stride s
    reads, for pixel q, the place `(q + 1/2) * n / H - 1/2` of its n cells (q - (s - 1)/2 px if s divides H);
    run at another stride, it must read the same place, or its output is shifted by half the difference.
    With `align_corners` the place is `q * (n - 1) / (H - 1)`.
    """
    if stride == trained_stride and every == 1:
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)
    rows, columns = (
        _interpolation_matrix(logits.shape[axis], length, stride, trained_stride, align_corners, every).to(
            logits
        )
        for axis, length in zip((2, 3), size, strict=True)
    )
    with nullcontext() if logits.is_meta else torch.autocast(logits.device.type, enabled=False):
        return rows @ logits.contiguous() @ columns.T  # in float32, also under autocast


def _interpolation_matrix(
    cells: int, length: int, stride: int, trained_stride: int, align_corners: bool, every: int
) -> Tensor:
    """`[ceil(length / every), cells]` float64: the share of each cell in each pixel, along one axis."""
    pixels = torch.arange(0, length, every, dtype=torch.float64)
    pixels = (pixels + every // 2).clamp_max(length - 1)
    trained_cells = -(-length // trained_stride)
    if align_corners:
        places = pixels * ((trained_cells - 1) / max(length - 1, 1))
    else:
        places = (pixels + 0.5) * (trained_cells / length) - 0.5
    places = (places * (trained_stride / stride)).clamp(0, cells - 1)[:, None]
    return (1 - (places - torch.arange(cells)).abs()).clamp_min(0)
