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

from sparse_seg.sparse.conv import Place, check_exchange
from sparse_seg.sparse.engines import gather
from sparse_seg.sparse.features import grid_to_rows, lattice_grid
from sparse_seg.sparse.layout import SiteLayout
from sparse_seg.sparse.neighbours import TAPS
from sparse_seg.sparse.step import Step

WINDOW = (4, 5, 7, 8)  # taps of a 3x3 kernel that a 2x2 window reads: its own place, right, below, diagonal


class SelectiveDepthwiseConv2d(nn.Module):
    """Depthwise 3x3 convolution over the sites of a layout, without bias but for a folded batch norm's.

    Its weight is stored `[C, 3, 3, 1]`: KRSC with one input channel a group.

    Args:
        channels: C.
        spacing: distance between taps in pixels.
        exchange: what an extra site reads where its level has no site, see `SelectiveConv2d`.
    """

    bias: nn.Parameter | None

    def __init__(self, channels: int, spacing: int, exchange: str = "linear") -> None:
        super().__init__()
        check_exchange(exchange)
        self.channels = self.out_channels = channels
        self.spacing, self.exchange = spacing, exchange
        self.weight = nn.Parameter(torch.empty(channels, 3, 3, 1))
        self.register_parameter("bias", None)
        nn.init.normal_(self.weight, std=math.sqrt(2 / TAPS))  # He et al., 2015

    def forward(self, rows: Tensor, src: SiteLayout | Step, dst: SiteLayout | Step) -> Tensor:
        """Rows `[src.num_run, C]` to `[dst.num_run, C]`."""
        src, dst = Step.of(src), Step.of(dst)
        rows = dst.complete(rows, src, self)
        exchange = dst.exchange or self.exchange
        out = depthwise_conv2d(rows, self.weight, src, dst, self.spacing, exchange)
        return out if self.bias is None else out + self.bias

    def sites(self, src: Place, dst: Place) -> Place:
        """Where its outputs stand, asked to go from `src` to `dst`: steps, or strides in px."""
        return dst

    def plain(self, src: int, dst: int) -> nn.Conv2d:
        """Dense, from stride `src` to `dst`, px."""
        dilation, channels = self.spacing // src, self.channels
        conv = nn.Conv2d(
            channels, channels, 3, dst // src, dilation, dilation, groups=channels, bias=False
        ).to(self.weight)
        conv.weight.data.copy_(self.weight.data.permute(0, 3, 1, 2))
        return conv

    def macs(self, src: Step, dst: Step) -> int:
        """Multiply-adds: sites x taps x C."""
        return dst.num_run * self.weight.numel()

    def extra_repr(self) -> str:
        return f"{self.channels}, spacing={self.spacing}px, exchange={self.exchange}"


class SelectiveAvgPool2d(nn.Module):
    """Mean of the 2x2 window of a site and the places `spacing` px to the right, below, and both.

    Places outside the image do not count, as `nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)`.
    """

    def __init__(self, spacing: int, exchange: str = "linear") -> None:
        super().__init__()
        self.spacing, self.exchange = spacing, exchange

    def forward(self, rows: Tensor, src: SiteLayout | Step, dst: SiteLayout | Step) -> Tensor:
        """Rows `[src.num_run, C]` to `[dst.num_run, C]`."""
        src, dst = Step.of(src), Step.of(dst)
        rows = dst.complete(rows, src, self)
        gather.check_rows(rows, src.layout)
        stride, dilation = gather.lattice_conv_geometry(src.layout, dst.layout, self.spacing)
        lattice, exchange = rows[:0], dst.exchange or self.exchange
        if dst.runs_lattice and not src.layout.separates(exchange):
            lattice = grid_to_rows(window_mean(lattice_grid(rows, src.layout), stride, dilation))
            if dst.layout.num_extra == 0:
                return lattice
        table = dst.neighbours(src, self.spacing, exchange)
        values, window = gather.neighbour_values(rows, table), table.index[:, list(WINDOW)]
        count = (window < values.shape[0] - 1).sum(1, keepdim=True)  # the last value is the zero outside
        return torch.cat((lattice, values[window].sum(1) / count))

    def plain(self, src: int, dst: int) -> PlainAvgPool2d:
        """Dense, from stride `src` to `dst`, px."""
        return PlainAvgPool2d(dst // src, self.spacing // src)

    def extra_repr(self) -> str:
        return f"spacing={self.spacing}px, exchange={self.exchange}"


class PlainAvgPool2d(nn.Module):
    """`SelectiveAvgPool2d` on a grid, with a window that grows with the dilation."""

    def __init__(self, stride: int, dilation: int) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation

    def forward(self, grid: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, ceil(H/stride), ceil(W/stride)]`."""
        return window_mean(grid, self.stride, self.dilation)


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
    rows: Tensor,
    weight: Tensor,
    src: SiteLayout | Step,
    dst: SiteLayout | Step,
    spacing: int,
    exchange: str,
) -> Tensor:
    """Depthwise 3x3 convolution from the sites of `src` to the sites of `dst`, taps `spacing` px apart.

    Args:
        rows: `[N, C]` of all sites of `src`.
        weight: `[C, 3, 3, 1]`.

    Raises:
        ValueError: the spacing does not fall on the lattice of `src`, or rows and layout differ in length.
    """
    src, dst = Step.of(src), Step.of(dst)
    gather.check_rows(rows, src.layout)
    rows, weight = gather.autocast(rows, weight)
    stride, dilation = gather.lattice_conv_geometry(src.layout, dst.layout, spacing)
    lattice = rows[:0]
    if dst.runs_lattice and not src.layout.separates(exchange):
        grid, kernel = lattice_grid(rows, src.layout), weight.permute(0, 3, 1, 2)
        lattice = grid_to_rows(F.conv2d(grid, kernel, None, stride, dilation, dilation, rows.shape[1]))
        if dst.layout.num_extra == 0:
            return lattice
    table = dst.neighbours(src, spacing, exchange)
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
