"""The layers that a network on sites is made of: 3x3 convolution over sites, and 1x1.

Each owns its forms: `plain` (`nn.Conv2d`, dense) and `macs`. With a bias where a batch norm was folded in.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.sparse.engines import ENGINES, gather, spconv
from sparse_seg.sparse.engines.undilated import undilated_conv2d
from sparse_seg.sparse.layout import EXCHANGES, SiteLayout
from sparse_seg.sparse.neighbours import TAPS
from sparse_seg.sparse.step import Step

Place = TypeVar("Place")


class SelectiveConv2d(nn.Module):
    """3x3 convolution over the sites of a layout, without bias but for a folded batch norm's.

    Its taps lie `spacing` pixels apart whatever the levels: the dilation of a dense convolution follows from
    the stride it runs at. The weight is stored `[O, 3, 3, I]` (spconv's KRSC), which is at once a
    channels_last OIHW tensor and the matrix of a gather-GEMM.

    Args:
        in_channels, out_channels: I and O.
        spacing: distance between taps in pixels; None for one cell of the layout's finest grid, whatever its
            stride, see `engines/undilated.py`.
        exchange: what an extra site reads where its level has no site: `linear`, `nearest` or `none`;
            or `separate`: no site reads one of another level, see `SiteLayout.neighbours_of_cells`.
        engine: `gather`, `spconv`, or `auto`: spconv on CUDA where it works and runs the dtype, else gather.

    Raises (forward):
        EngineError: the engine is spconv, and it is missing, broken, or cannot run this dtype or backward.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spacing: int | None,
        exchange: str = "linear",
        engine: str = "auto",
    ) -> None:
        super().__init__()
        check_exchange(exchange)
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.spacing, self.exchange, self.engine = spacing, exchange, engine
        self.weight = nn.Parameter(torch.empty(out_channels, 3, 3, in_channels))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation over the outputs, as ResNet's (He et al., 2015)."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / (TAPS * self.out_channels)))

    def forward(self, rows: Tensor, src: SiteLayout | Step, dst: SiteLayout | Step) -> Tensor:
        """Rows `[src.num_run, I]` to `[dst.num_run, O]`: those of all sites, or in a step of the new ones."""
        src, dst = Step.of(src), Step.of(dst)
        exchange = dst.exchange or self.exchange
        if self.spacing is None:
            return undilated_conv2d(rows, self.weight, dst.layout, exchange, self.bias)
        rows = dst.complete(rows, src, self)
        engine = _engine(dst.engine or self.engine, rows, src, dst)
        return engine.selective_conv2d(rows, self.weight, src, dst, self.spacing, exchange, self.bias)

    def sites(self, src: Place, dst: Place) -> Place:
        """Where its outputs stand, asked to go from `src` to `dst`: steps, or strides in px."""
        return dst

    def plain(self, src: int, dst: int) -> nn.Conv2d:
        """Dense, from stride `src` to `dst`, px."""
        dilation = 1 if self.spacing is None else self.spacing // src
        conv = nn.Conv2d(self.in_channels, self.out_channels, 3, dst // src, dilation, dilation, bias=False)
        conv.to(self.weight).weight.data.copy_(self.weight.data.permute(0, 3, 1, 2))
        return conv

    def macs(self, src: Step, dst: Step) -> int:
        """Multiply-adds: sites x taps x I x O."""
        return dst.num_run * self.weight.numel()

    def extra_repr(self) -> str:
        spacing = "1 cell" if self.spacing is None else f"{self.spacing}px"
        return (
            f"{self.in_channels}, {self.out_channels}, spacing={spacing}, "
            f"exchange={self.exchange}, engine={self.engine}"
        )


class SelectiveLinear(nn.Linear):
    """1x1 convolution without bias: it runs on the sites it is given, with `SelectiveConv2d`'s interface."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, bias=False)
        self.out_channels = out_channels

    def forward(self, rows: Tensor, src: Any = None, dst: Any = None) -> Tensor:
        """`[N, I]` to `[N, O]`."""
        return F.linear(rows, self.weight, self.bias)

    def sites(self, src: Place, dst: Place) -> Place:
        return src

    def plain(self, src: int = 1, dst: int = 1) -> nn.Conv2d:
        conv = nn.Conv2d(self.in_features, self.out_features, 1, dst // src, bias=False).to(self.weight)
        conv.weight.data.copy_(self.weight.data[:, :, None, None])
        return conv

    def macs(self, src: Step, dst: Step | None = None) -> int:
        return src.num_run * self.weight.numel()


def check_exchange(exchange: str) -> None:
    """Raises a ValueError for an unknown exchange rule."""
    if exchange not in EXCHANGES:
        raise ValueError(f"unknown exchange {exchange!r}; choose one of {', '.join(EXCHANGES)}")


def plain_norm(norm: nn.BatchNorm1d) -> nn.BatchNorm2d:
    """A batch norm of rows as one of grids."""
    plain = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum).to(norm.weight)
    plain.load_state_dict(norm.state_dict())
    return plain


def _engine(name: str, rows: Tensor, src: Step, dst: Step) -> ModuleType:
    if name == "auto" and spconv.runs(src, dst):
        return spconv if spconv.suits(rows.device, gather.autocast_dtype(rows)) else gather
    return spconv if name == "spconv" else gather
