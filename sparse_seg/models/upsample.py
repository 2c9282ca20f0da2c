"""Bilinear upsampling of logits that keeps the offset the network was trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample_logits(logits: Tensor, size: tuple[int, int], stride: int, trained_stride: int) -> Tensor:
    """Logits `[B, K, h, w]` at `stride` px to `[B, K, H, W]`.

    Sites sit at multiples of their stride. A network trained with half-pixel upsampling at output stride s
    reads, for pixel q, the place `(q + 1/2) * n / H - 1/2` of its n cells (q - (s - 1)/2 px if s divides H);
    run at another stride, it must read the same place, or its output is shifted by half the difference.
    """
    if stride == trained_stride:
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    for axis, length in zip((2, 3), size, strict=True):
        cells = logits.shape[axis]
        trained_cells = -(-length // trained_stride)
        pixel = torch.arange(length, device=logits.device, dtype=torch.float64)
        place = ((pixel + 0.5) * (trained_cells / length) - 0.5) * (trained_stride / stride)
        place = place.clamp(0, cells - 1)
        low = place.long()
        share = (place - low).to(logits.dtype).view([-1, 1] if axis == 2 else [-1])
        first = logits.index_select(axis, low)
        second = logits.index_select(axis, (low + 1).clamp_max(cells - 1))
        logits = torch.lerp(first, second, share)
    return logits
