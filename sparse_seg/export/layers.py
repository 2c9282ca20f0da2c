"""Static forms of layers with folded norms: each runs on a lattice's grid and on rows of extra sites.

A weight is held once, as `[O, 3, 3, I]`: that is a channels_last OIHW kernel for grids and a matrix `[O, 9
* I]` for rows. Runtimes fold the change of layout when they load a file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.export.sites import Lattice, Sites
from sparse_seg.sparse.depthwise import WINDOW, window_mean

TAPS = 9


def frozen(weight: Tensor, bias: Tensor | None) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight `[O, ...]` and bias `[O]`, by default zero, in float32."""
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    weight, bias = (value.detach().float().contiguous() for value in (weight, bias))
    return nn.Parameter(weight, False), nn.Parameter(bias, False)


class OnGrid(nn.Module):
    """A convolution of a grid `[B, I, h, w]`; weight `[O, k, k, I / groups]`."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter, groups: int = 1) -> None:
        super().__init__()
        self.weight, self.bias, self.groups = weight, bias, groups

    def forward(self, grid: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        padding = dilation * (self.weight.shape[1] // 2)
        kernel = self.weight.permute(0, 3, 1, 2)
        return F.conv2d(grid, kernel, self.bias, stride, padding, dilation, self.groups)


class OnRows(nn.Module):
    """The same convolution as one matrix product: taps `[M * k * k, I]` to rows `[M, O]`."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias: nn.Parameter | None = bias
        self.width = weight[0].numel()

    def forward(self, taps: Tensor, plus: Tensor | None = None) -> Tensor:
        """plus: `[M, O]`, added; it stands for the bias, too, where that has been moved into it."""
        bias: Tensor | None = self.bias
        if plus is not None:
            bias = plus if bias is None else plus + bias
        assert bias is not None
        return torch.addmm(bias, taps.reshape(-1, self.width), self.weight.reshape(-1, self.width).t())


class OnSites(nn.Module):
    """A convolution with a form for grids and one for rows, its taps `spacing` px apart."""

    lattice: nn.Module
    extra: nn.Module
    spacing: int

    def on_lattice(self, lattice: Lattice, stride: int) -> Tensor:
        """The grid `[B, O, ...]` at `stride`."""
        return self.lattice(lattice.grid, stride // lattice.stride, max(1, self.spacing // lattice.stride))

    def on_extras(
        self, sites: Sites, strides: list[int], plus: dict[int, Tensor] | None = None
    ) -> dict[int, Tensor]:
        """Rows `[3 * K, O]` of the extra sites at `strides`; `plus` is added to them."""
        return {
            stride: self.extra(sites.taps(stride, self.spacing), None if plus is None else plus[stride])
            for stride in strides
        }


class Conv(OnSites):
    """A convolution on sites.

    Args:
        weight: `[O, 3, 3, I]`, or `[O, I]` of a 1x1 convolution.
        bias: `[O]`; None for zero.
        spacing: px between its taps.
    """

    lattice: OnGrid
    extra: OnRows

    def __init__(self, weight: Tensor, bias: Tensor | None = None, spacing: int = 0) -> None:
        super().__init__()
        weight, bias = frozen(weight if weight.ndim == 4 else weight[:, None, None], bias)
        self.lattice, self.extra, self.spacing = OnGrid(weight, bias), OnRows(weight, bias), spacing


class Depthwise(OnSites):
    """A depthwise 3x3 convolution on sites; weight `[C, 3, 3, 1]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, spacing: int) -> None:
        super().__init__()
        weight, bias = frozen(weight, bias)
        self.channels, self.spacing = int(weight.shape[0]), spacing
        self.lattice, self.extra = OnGrid(weight, bias, self.channels), DepthwiseOnRows(weight, bias)


class DepthwiseOnRows(nn.Module):
    """Taps `[M * 9, C]` to `[M, C]`."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias, self.channels = weight, bias, int(weight.shape[0])

    def forward(self, taps: Tensor, plus: Tensor | None = None) -> Tensor:
        weight = self.weight.reshape(self.channels, TAPS).t()
        out = (taps.reshape(-1, TAPS, self.channels) * weight).sum(1) + self.bias
        return out if plus is None else out + plus


def static_conv(layer: Any) -> Conv:
    """Of a `SelectiveConv2d` or a `SelectiveLinear`."""
    return Conv(layer.weight, layer.bias, getattr(layer, "spacing", 0))


def move_bias(last: Conv, shortcut: Conv) -> None:
    """On rows, add the bias of a block's last convolution with that of its shortcut: one sum less."""
    assert last.extra.bias is not None
    assert shortcut.extra.bias is not None
    shortcut.extra.bias = nn.Parameter(shortcut.extra.bias + last.extra.bias, False)
    last.extra.bias = None


class AvgPool(nn.Module):
    """Mean of a site's 2x2 window, of its places inside the image (ResNet-D's shortcut)."""

    def __init__(self, spacing: int) -> None:
        super().__init__()
        self.spacing = spacing

    def on_lattice(self, lattice: Lattice, stride: int) -> Tensor:
        return window_mean(lattice.grid, stride // lattice.stride, self.spacing // lattice.stride)

    def on_extras(self, sites: Sites, strides: list[int]) -> dict[int, Tensor]:
        ones = Lattice(torch.ones_like(sites.lattice.grid[:, :1]), sites.lattice.stride)
        extras = {stride: rows.new_ones(int(rows.shape[0]), 1) for stride, rows in sites.extras.items()}
        inside = Sites(ones, extras, sites.splits)
        counts = {stride: self._sum(inside.taps(stride, self.spacing)).clamp(min=1) for stride in strides}
        return {stride: self._sum(sites.taps(stride, self.spacing)) / counts[stride] for stride in strides}

    def _sum(self, taps: Tensor) -> Tensor:
        first, *others = (taps.reshape(-1, TAPS, int(taps.shape[1]))[:, tap] for tap in WINDOW)
        return sum(others, first)
