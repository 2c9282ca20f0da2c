"""The one layer that needs the layout: a 3x3 convolution over sites."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor, nn

from sparse_seg.sparse.engines import ENGINES, gather, spconv
from sparse_seg.sparse.engines.undilated import undilated_conv2d
from sparse_seg.sparse.layout import EXCHANGES, SiteLayout
from sparse_seg.sparse.neighbours import TAPS


class SelectiveConv2d(nn.Module):
    """3x3 convolution over the sites of a layout, without bias.

    Its taps lie `spacing` pixels apart whatever the levels: the dilation of a dense convolution follows from
    the stride it runs at. The weight is stored `[O, 3, 3, I]` (spconv's KRSC), which is at once a
    channels_last OIHW tensor and the matrix of a gather-GEMM.

    Args:
        in_channels, out_channels: I and O.
        spacing: distance between taps in pixels; None for one cell of the layout's finest grid, whatever its
            stride, see `engines/undilated.py`.
        exchange: what an extra site reads where its level has no site: `linear`, `nearest` or `none`.
        engine: `gather`, `spconv`, or `auto`: spconv on CUDA where it works and runs the dtype, else gather.

    After a forward, `macs` holds its multiply-adds: sites x taps x I x O.

    Raises (forward):
        EngineError: the engine is spconv, and it is missing, broken, or cannot run this dtype or backward.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spacing: int | None,
        exchange: str = "linear",
        engine: str = "auto",
    ) -> None:
        super().__init__()
        if exchange not in EXCHANGES:
            raise ValueError(f"unknown exchange {exchange!r}; choose one of {', '.join(EXCHANGES)}")
        if engine not in ENGINES:
            raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.spacing, self.exchange, self.engine = spacing, exchange, engine
        self.weight = nn.Parameter(torch.empty(out_channels, 3, 3, in_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialisation over the outputs, as ResNet's (He et al., 2015)."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / (TAPS * self.out_channels)))

    def forward(self, rows: Tensor, src: SiteLayout, dst: SiteLayout) -> Tensor:
        """Rows `[src.num_run, I]` to `[dst.num_run, O]`: those of all sites, or in a step of the new ones."""
        self.macs = dst.num_run * TAPS * self.in_channels * self.out_channels
        if self.spacing is None:
            return undilated_conv2d(rows, self.weight, dst, self.exchange)
        rows = dst.complete(rows, src, self)
        engine = _engine(self.engine, rows, src, dst)
        return engine.selective_conv2d(rows, self.weight, src, dst, self.spacing, self.exchange)

    def extra_repr(self) -> str:
        spacing = "1 cell" if self.spacing is None else f"{self.spacing}px"
        return (
            f"{self.in_channels}, {self.out_channels}, spacing={spacing}, "
            f"exchange={self.exchange}, engine={self.engine}"
        )


def _engine(name: str, rows: Tensor, src: SiteLayout, dst: SiteLayout) -> ModuleType:
    if name == "auto" and spconv.runs(src, dst):
        return spconv if spconv.suits(rows.device, gather.autocast_dtype(rows)) else gather
    return spconv if name == "spconv" else gather
