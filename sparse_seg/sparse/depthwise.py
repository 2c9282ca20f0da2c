"""Depthwise 3x3 convolution and 2x2 average pooling over sites: each channel by itself, so no GEMM.

The lattice goes through PyTorch; an extra site is the weighted sum of its gathered neighbours, one tap at a
time, so that no more than one copy of the extra sites' features is held. Exchange rules are those of
`SelectiveConv2d`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparse_seg.sparse.engines import gather
from sparse_seg.sparse.features import grid_to_rows, lattice_grid
from sparse_seg.sparse.layout import EXCHANGES, SiteLayout
from sparse_seg.sparse.neighbours import TAPS

WINDOW = (4, 5, 7, 8)  # taps of a 3x3 kernel that a 2x2 window reads: its own place, right, below, diagonal


class SelectiveDepthwiseConv2d(nn.Module):
    """Depthwise 3x3 convolution over the sites of a layout, without bias.

    Its weight is stored `[C, 3, 3, 1]`: KRSC with one input channel a group.

    Args:
        channels: C.
        spacing: distance between taps in pixels.
        exchange: what an extra site reads where its level has no site, see `SelectiveConv2d`.

    After a forward, `macs` holds its multiply-adds: sites x taps x C.
    """

    def __init__(self, channels: int, spacing: int, exchange: str = "linear") -> None:
        super().__init__()
        if exchange not in EXCHANGES:
            raise ValueError(f"unknown exchange {exchange!r}; choose one of {', '.join(EXCHANGES)}")
        self.channels, self.spacing, self.exchange = channels, spacing, exchange
        self.weight = nn.Parameter(torch.empty(channels, 3, 3, 1))
        nn.init.normal_(self.weight, std=math.sqrt(2 / TAPS))  # He et al., 2015

    def forward(self, rows: Tensor, src: SiteLayout, dst: SiteLayout) -> Tensor:
        """Rows `[src.num_run, C]` to `[dst.num_run, C]`."""
        rows = dst.complete(rows, src, self)
        self.macs = dst.num_run * TAPS * self.channels
        return depthwise_conv2d(rows, self.weight, src, dst, self.spacing, self.exchange)

    def extra_repr(self) -> str:
        return f"{self.channels}, spacing={self.spacing}px, exchange={self.exchange}"


class SelectiveAvgPool2d(nn.Module):
    """Mean of the 2x2 window of a site and the places `spacing` px to the right, below, and both.

    Places outside the image do not count, as `nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)`.
    """

    def __init__(self, spacing: int, exchange: str = "linear") -> None:
        super().__init__()
        self.spacing, self.exchange = spacing, exchange

    def forward(self, rows: Tensor, src: SiteLayout, dst: SiteLayout) -> Tensor:
        """Rows `[src.num_run, C]` to `[dst.num_run, C]`."""
        rows = dst.complete(rows, src, self)
        gather.check_rows(rows, src)
        stride, dilation = gather.lattice_conv_geometry(src, dst, self.spacing)
        lattice = rows[:0]
        if dst.runs_lattice:
            lattice = grid_to_rows(window_mean(lattice_grid(rows, src), stride, dilation))
            if dst.num_extra == 0:
                return lattice
        table = src.neighbours(dst, self.spacing, self.exchange)
        values, window = gather.neighbour_values(rows, table), table.index[:, list(WINDOW)]
        count = (window < values.shape[0] - 1).sum(1, keepdim=True)  # the last value is the zero outside
        return torch.cat((lattice, values[window].sum(1) / count))

    def extra_repr(self) -> str:
        return f"spacing={self.spacing}px, exchange={self.exchange}"


def window_mean(grid: Tensor, stride: int, dilation: int) -> Tensor:
    """2x2 mean on a grid, of the places inside it: `[B, C, H, W]` to `[B, C, ceil(H/stride), ...]`."""

    def window_sum(values: Tensor) -> Tensor:
        height, width = values.shape[2:]
        padded = F.pad(values, (0, dilation, 0, dilation))
        taps = [
            padded[:, :, y : y + height : stride, x : x + width : stride]
            for y in (0, dilation)
            for x in (0, dilation)
        ]
        return taps[0] + taps[1] + taps[2] + taps[3]

    return window_sum(grid) / window_sum(grid.new_ones(1, 1, *grid.shape[2:]))


def depthwise_conv2d(
    rows: Tensor, weight: Tensor, src: SiteLayout, dst: SiteLayout, spacing: int, exchange: str
) -> Tensor:
    """Depthwise 3x3 convolution from the sites of `src` to those of `dst`, taps `spacing` px apart.

    Args:
        rows: `[src.num_sites, C]`.
        weight: `[C, 3, 3, 1]`.

    Raises:
        ValueError: the spacing does not fall on the lattice of `src`, or rows and layout differ in length.
    """
    gather.check_rows(rows, src)
    rows, weight = gather.autocast(rows, weight)
    stride, dilation = gather.lattice_conv_geometry(src, dst, spacing)
    lattice = rows[:0]
    if dst.runs_lattice:
        grid, kernel = lattice_grid(rows, src), weight.permute(0, 3, 1, 2)
        lattice = grid_to_rows(F.conv2d(grid, kernel, None, stride, dilation, dilation, rows.shape[1]))
        if dst.num_extra == 0:
            return lattice
    table = src.neighbours(dst, spacing, exchange)
    values = gather.neighbour_values(rows, table)
    return torch.cat((lattice, _WeightedSum.apply(values, table.index, weight.flatten(1).t())))


class _WeightedSum(torch.autograd.Function):
    """`out[m] = sum over k of values[index[m, k]] * weight[k]`; gathers again in backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(values, index, weight)
        out = values.new_zeros(index.shape[0], values.shape[1])
        for neighbour, factor in zip(index.unbind(1), weight.unbind(0), strict=True):
            out.addcmul_(values.index_select(0, neighbour), factor)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, index, weight = ctx.saved_tensors
        grad_values, grad_weight = torch.zeros_like(values), torch.zeros_like(weight)
        for tap, neighbour in enumerate(index.unbind(1)):
            grad_values.index_add_(0, neighbour, grad * weight[tap])
            grad_weight[tap] = (values.index_select(0, neighbour) * grad).sum(0)
        return grad_values, None, grad_weight
