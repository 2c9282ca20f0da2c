"""Winograd's minimal filtering F(2x2, 3x3) for dense 3x3 convolutions on a grid of rows.

Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (CVPR 2016): 16 products for four outputs
in place of 36, as sixteen matrix products over all 4x4 tiles. A dilated convolution is one per phase.
"""

from __future__ import annotations

import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
_A = ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, -1.0))
_ONES = 5  # the one of the 16 transformed products that each output of a tile holds once: bias goes there
_TILES = 512  # in a piece of the work: enough rows for the products, buffers of a few MiB


def transform_weight(weight: Tensor) -> Tensor:
    """KRSC `[O, 3, 3, I]` to `[16, I, O]`, what `winograd_conv2d` multiplies with."""
    g = torch.tensor(_G, dtype=weight.dtype, device=weight.device)
    return torch.einsum("ky,lx,oyxi->klio", g, g, weight).flatten(0, 1).contiguous()


class Workspace(threading.local):
    """Buffers that one thread's convolutions share: fresh memory would cost as much as the transforms."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised contiguous tensor; it shares memory with the last one of that name."""
        buffer, size = self._buffers.get(name), math.prod(shape)
        if (
            buffer is None
            or buffer.numel() < size
            or (buffer.dtype, buffer.device) != (like.dtype, like.device)
        ):
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(shape)


def winograd_conv2d(
    grid: Tensor, weight: Tensor, bias: Tensor, dilation: int, workspace: Workspace | None = None
) -> Tensor:
    """3x3 convolution with stride 1 and padding `dilation`; no autograd.

    Args:
        grid: `[B, H, W, I]`, contiguous.
        weight: `[16, I, O]`, from `transform_weight`.
        bias: `[O]`.
        workspace: buffers to reuse.

    Returns:
        `[B, H, W, O]`, contiguous where the grid's sides are multiples of twice the dilation.
    """
    batch, height, width, _ = grid.shape
    d, out_channels, workspace = dilation, weight.shape[2], workspace or Workspace()
    down, across = math.ceil(height / (2 * d)), math.ceil(width / (2 * d))  # tiles of a phase
    padded = F.pad(grid, (0, 0, d, (2 * across + 1) * d - width, d, (2 * down + 1) * d - height))
    out = grid.new_empty(batch, down, 2, d, across, 2, d, out_channels)
    step = max(1, _TILES // (batch * d * across * d))
    for first in range(0, down, step):
        last = min(first + step, down)
        rows = padded[:, 2 * first * d : 2 * (last + 1) * d]
        _convolve_rows(rows, weight, bias, d, out[:, first:last], workspace)
    return out.view(batch, 2 * down * d, 2 * across * d, out_channels)[:, :height, :width]


def _convolve_rows(
    padded: Tensor, weight: Tensor, bias: Tensor, d: int, out: Tensor, workspace: Workspace
) -> None:
    """Some rows of tiles, written to `out [B, down, 2, d, across, 2, d, O]`."""
    batch, down, _, _, across, _, _, out_channels = out.shape
    channels, tiles = padded.shape[-1], batch * down * d * across * d
    rows = workspace.take("rows", (4, batch, down, d, padded.shape[2], channels), padded)
    _transform(_places(padded, 1, down, d), list(rows))
    values = workspace.take("values", (4, 4, batch, down, d, across, d, channels), padded)
    _transform(_places(rows, 4, across, d), [values[:, place] for place in range(4)])
    products = workspace.take("products", (16, tiles, out_channels), padded)
    torch.bmm(values.view(16, tiles, channels), weight, out=products)
    products[_ONES] += bias

    a = torch.tensor(_A, dtype=padded.dtype, device=padded.device)
    sums = workspace.take("rows", (2, products.numel() // 4), padded)
    torch.mm(a, products.view(4, -1), out=sums)
    sums = sums.view(2, 4, batch, down, d, across, d, out_channels)
    left, right = (out[:, :, :, :, :, side].permute(2, 0, 1, 3, 4, 5, 6) for side in (0, 1))
    torch.add(sums[:, 0], sums[:, 1], out=left).add_(sums[:, 2])
    torch.sub(sums[:, 1], sums[:, 2], out=right).sub_(sums[:, 3])


def _places(grid: Tensor, axis: int, tiles: int, d: int) -> list[Tensor]:
    """Views `[..., tiles, d, ...]`: the first to fourth place along `axis` of each tile of each phase."""
    shape = (*grid.shape[:axis], tiles, d, *grid.shape[axis + 1 :])
    step = grid.stride(axis)
    strides = (*grid.stride()[:axis], 2 * d * step, step, *grid.stride()[axis + 1 :])
    return [grid.as_strided(shape, strides, grid.storage_offset() + place * d * step) for place in range(4)]


def _transform(places: list[Tensor], out: list[Tensor]) -> None:
    """The input transform along one axis."""
    torch.sub(places[0], places[2], out=out[0])
    torch.add(places[1], places[2], out=out[1])
    torch.sub(places[2], places[1], out=out[2])
    torch.sub(places[1], places[3], out=out[3])
