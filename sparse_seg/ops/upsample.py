"""Bilinear upsampling of logits that keeps the offset the network was trained with, or of classes alone."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_VALUES = 2**26  # that are interpolated at once: 256 MB


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
    geometry = stride, trained_stride, align_corners, every
    rows, columns = (
        interpolation_matrix(logits.shape[axis], length, *geometry, logits.dtype, logits.device)
        for axis, length in zip((2, 3), size, strict=True)
    )
    with nullcontext() if logits.is_meta else torch.autocast(logits.device.type, enabled=False):
        return rows @ logits.contiguous() @ columns.T  # in float32, also under autocast


def at_least_float32(logits: Tensor) -> Tensor:
    """What logits are upsampled in, whatever precision they come in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def sampled_pixels(length: int, every: int) -> Tensor:
    """Which pixels of an axis `upsample_logits` gives with `every`, int64 `[ceil(length / every)]`."""
    return (torch.arange(0, length, every, device="cpu") + every // 2).clamp_max(length - 1)


@torch.no_grad()
def upsample_classes(
    logits: Tensor, size: tuple[int, int], stride: int, trained_stride: int, align_corners: bool = False
) -> Tensor:
    """The classes int64 `[B, H, W]` of `upsample_logits`, with work only where classes meet (on the CPU).

    Between four cells of one class every pixel has that class too, for its logits are a mean of theirs;
    interpolation, and the search for the largest, is left for the others. Logits that are equal to rounding
    may give either class.
    """
    if logits.device.type != "cpu":
        return upsample_logits(logits, size, stride, trained_stride, align_corners).max(1).indices
    _, classes, height, width = logits.shape
    rows = _axis(height, size[0], stride, trained_stride, align_corners)
    columns = _axis(width, size[1], stride, trained_stride, align_corners)
    own = logits.max(1).indices
    lower, upper = own.index_select(1, rows.first), own.index_select(1, rows.second)
    near = lower.index_select(2, columns.first)
    mixed = near != lower.index_select(2, columns.second)
    mixed |= near != upper.index_select(2, columns.first)
    mixed |= near != upper.index_select(2, columns.second)
    result = near.index_select(2, columns.interval).index_select(1, rows.interval)
    table = logits.permute(0, 2, 3, 1).reshape(-1, classes)
    each = classes * len(rows.pixels) * len(columns.pixels)  # a place has m x m pixels or fewer
    for places in mixed.nonzero().T.contiguous().split(max(1, MOST_VALUES // each), dim=1):
        image, row, column = places  # [N] each
        # `down` is [m, 1, N], `across` [m, N]: the share of the second cell, of two beside each other
        mean = logits.new_zeros(classes, len(rows.pixels), len(columns.pixels), len(image))
        down, across = rows.share.to(logits)[:, None, row], columns.share.to(logits)[:, column]
        beside = (columns.first[column], 1 - across), (columns.second[column], across)
        for cell_row, row_share in ((rows.first[row], 1 - down), (rows.second[row], down)):
            start = (image * height + cell_row) * width
            for cell_column, share in beside:
                corner = table.index_select(0, start + cell_column).T.contiguous()
                mean.addcmul_(corner[:, None, None], row_share * share)
        pixels = (image * size[0] + rows.pixels[:, row])[:, None] * size[1] + columns.pixels[:, column]
        result.view(-1)[pixels.view(-1)] = mean.max(0).indices.view(-1)
    return result


class _Axis(NamedTuple):
    """The pixels along an axis, by the intervals between cells that they lie in, of at most m pixels each.

    `interval` `[L]` is that of each pixel. Each interval has its cells `first` and `second` `[n]` (the same
    one beyond the border), its `pixels` `[m, n]`, with the last one repeated, and their `share` `[m, n]` of
    the second cell.
    """

    interval: Tensor
    first: Tensor
    second: Tensor
    pixels: Tensor
    share: Tensor


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # kept tensors must serve training, too
def _axis(cells: int, length: int, stride: int, trained_stride: int, align_corners: bool) -> _Axis:
    places = _places(torch.arange(length, device="cpu"), cells, length, stride, trained_stride, align_corners)
    below = places.floor().long()
    cell, interval, count = below.unique(return_inverse=True, return_counts=True)
    pixels = (
        count.cumsum(0) - count + torch.arange(int(count.max()), device="cpu")[:, None].minimum(count - 1)
    )
    first, second = cell.clamp(0, cells - 1), (cell + 1).clamp(0, cells - 1)
    return _Axis(interval, first, second, pixels, places[pixels] - cell)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def interpolation_matrix(
    cells: int,
    length: int,
    stride: int,
    trained_stride: int,
    align_corners: bool,
    every: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`[ceil(length / every), cells]`: the share of each cell in each pixel, along one axis; kept where it is
    used, for a copy to a GPU waits for it."""
    pixels = sampled_pixels(length, every)
    places = _places(pixels, cells, length, stride, trained_stride, align_corners).clamp(0, cells - 1)
    shares = (1 - (places[:, None] - torch.arange(cells, device="cpu")).abs()).clamp_min(0)
    return shares.to(device, dtype)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def axis_shares(
    cells: int, length: int, stride: int, trained_stride: int, align_corners: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The two cells that each of `length` pixels of an axis lies between, int64 `[length]` each, and the
    share of the second, float64; as `upsample_logits` takes them."""
    pixels = torch.arange(length, device="cpu")
    places = _places(pixels, cells, length, stride, trained_stride, align_corners).clamp(0, cells - 1)
    first = places.floor().long()
    second = (first + 1).clamp_max(cells - 1)
    return first.to(device), second.to(device), (places - first).to(device)


def _places(
    pixels: Tensor, cells: int, length: int, stride: int, trained_stride: int, align_corners: bool
) -> Tensor:
    """Where pixels int64 `[N]` of an axis lie among its cells, float64, the first cell at 0."""
    trained_cells = cells if stride == trained_stride else -(-length // trained_stride)
    if align_corners:
        places = pixels.double() * ((trained_cells - 1) / max(length - 1, 1))
    else:
        places = (pixels.double() + 0.5) * (trained_cells / length) - 0.5
    return places * (trained_stride / stride)
