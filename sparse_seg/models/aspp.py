"""Atrous spatial pyramid pooling on rows (Chen et al., "Rethinking Atrous Convolution", 2017).

Its rates are even, so that its taps stay on the lattice and P1 to P3 hold (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.models.forms import plain, row_macs
from sparse_seg.sparse import (
    SelectiveConv2d,
    SelectiveDepthwiseConv2d,
    SelectiveLinear,
    SiteLayout,
    Step,
)
from sparse_seg.sparse.conv import plain_norm


class SelectiveSeparableConv2d(nn.Module):
    """Depthwise 3x3 and 1x1 convolution on rows (Chen et al., ECCV 2018), with the interface of
    `SelectiveConv2d`.

    Args:
        normed: whether batch norm and ReLU stand between the two.
    """

    def __init__(
        self, in_channels: int, out_channels: int, spacing: int, exchange: str, normed: bool
    ) -> None:
        super().__init__()
        self.depthwise = SelectiveDepthwiseConv2d(in_channels, spacing, exchange)
        self.norm = nn.BatchNorm1d(in_channels) if normed else None
        self.pointwise = SelectiveLinear(in_channels, out_channels)

    def forward(self, rows: Tensor, src: SiteLayout | Step, dst: SiteLayout | Step) -> Tensor:
        """Rows `[src.num_run, I]` to `[dst.num_run, O]`."""
        out = self.depthwise(rows, src, dst)
        return self.pointwise(out if self.norm is None else F.relu(self.norm(out), inplace=True))

    def norm_pairs(self) -> list[tuple[str, str]]:
        return [] if self.norm is None else [("depthwise", "norm")]

    def plain(self, src: int, dst: int) -> nn.Sequential:
        """Dense, from stride `src` to `dst`, px."""
        between = [] if self.norm is None else [plain_norm(self.norm), nn.ReLU(inplace=True)]
        return nn.Sequential(self.depthwise.plain(src, dst), *between, self.pointwise.plain())

    def macs(self, src: Step, dst: Step) -> int:
        return self.depthwise.macs(src, dst) + self.pointwise.macs(dst)


class PooledLinear(SelectiveLinear):
    """A linear layer without bias on rows `[n, C]` and, behind their channels, a vector `[B, P]` per image.

    The vector's share of the weight is multiplied once an image. Multiply-adds are counted as usual, as if
    the vector stood in every row.
    """

    def __init__(self, in_channels: int, pooled_channels: int, out_channels: int) -> None:
        super().__init__(in_channels + pooled_channels, out_channels)

    def forward(self, rows: Tensor, pooled: Tensor, step: Step) -> Tensor:  # type: ignore[override]
        """`[step.num_run, C]` and `[B, P]` to `[step.layout.num_sites, O]`: known rows change, too."""
        channels = rows.shape[1]
        local = step.complete(F.linear(rows, self.weight[:, :channels]), step, self)
        return local + F.linear(pooled, self.weight[:, channels:], self.bias)[step.layout.image_of_row]

    def macs(self, src: Step, dst: Step | None = None) -> int:
        return src.num_run * self.weight.numel()


class ASPP(nn.Module):
    """A 1x1 branch, 3x3 branches with wide spacings, image pooling; then a 1x1 projection of all.

    Args:
        spacings: distance between taps of each 3x3 branch, in pixels: rate x trained output stride.
        exchange, engine: of the 3x3 branches, see `SelectiveConv2d`.
        separable: of the 3x3 branches: `none`; `linear`, depthwise and 1x1; `normed`, with norm and ReLU
            between the two.
        projection: without it the output is the branches side by side (mmsegmentation projects by a 3x3).
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        spacings: Sequence[int],
        exchange: str,
        engine: str = "auto",
        dropout: float = 0.5,
        separable: str = "none",
        projection: bool = True,
    ) -> None:
        super().__init__()

        def atrous(spacing: int) -> nn.Module:
            if separable == "none":
                return SelectiveConv2d(in_channels, channels, spacing, exchange, engine)
            return SelectiveSeparableConv2d(in_channels, channels, spacing, exchange, separable == "normed")

        self.point: Any = linear_norm_relu(in_channels, channels)
        self.atrous = nn.ModuleList(map(atrous, spacings))
        self.atrous_bn = nn.ModuleList(nn.BatchNorm1d(channels) for _ in spacings)
        self.pool: Any = linear_norm_relu(in_channels, channels)
        self.out_channels = (2 + len(spacings)) * channels
        self.project: Any = None
        if projection:
            self.project = nn.Sequential(
                PooledLinear(self.out_channels - channels, channels, channels),
                nn.BatchNorm1d(channels),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
            )
            self.out_channels = channels

    def forward(self, rows: Tensor, step: Step) -> Tensor:
        """Rows `[step.num_run, in_channels]` to `[step.layout.num_sites, out_channels]`."""
        branches = [self.point(rows)]
        for conv, norm in zip(self.atrous, self.atrous_bn, strict=True):
            branches.append(F.relu(norm(conv(rows, step, step)), inplace=True))
        pooled = self.pool(mean_by_area(step.complete(rows, step, self), step.layout))
        local = torch.cat(branches, 1)
        if self.project is None:
            return concat_pooled(step.complete(local, step, self.pool), pooled, step.layout)
        linear, *rest = self.project
        return nn.Sequential(*rest)(linear(local, pooled, step))

    def norm_pairs(self) -> list[tuple[str, str]]:
        last = ["" if isinstance(conv, SelectiveConv2d) else ".pointwise" for conv in self.atrous]
        return [(f"atrous.{index}{name}", f"atrous_bn.{index}") for index, name in enumerate(last)]

    def plain(self, src: int, dst: int) -> PlainASPP:
        """Dense at stride `src`, px."""
        return PlainASPP(self, src)

    def macs(self, src: Step, dst: Step) -> int:
        total = row_macs(self.point, src) + sum(row_macs(conv, src) for conv in self.atrous)
        total += src.layout.batch * self.pool[0].weight.numel()  # one vector an image
        return total + (0 if self.project is None else self.project[0].macs(src, dst))


class PlainASPP(nn.Module):
    """`ASPP` on a grid."""

    def __init__(self, aspp: ASPP, stride: int) -> None:
        super().__init__()
        branches: Any = zip(aspp.atrous, aspp.atrous_bn, strict=True)
        self.point = plain(aspp.point, stride)
        self.atrous = nn.ModuleList(
            nn.Sequential(conv.plain(stride, stride), plain_norm(norm), nn.ReLU(inplace=True))
            for conv, norm in branches
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), plain(aspp.pool, stride))
        self.project = nn.Sequential() if aspp.project is None else plain(aspp.project, stride)

    def forward(self, grid: Tensor) -> Tensor:
        """`[B, I, H, W]` to `[B, O, H, W]`."""
        pooled = self.pool(grid).expand(-1, -1, *grid.shape[2:])
        return self.project(
            torch.cat([self.point(grid), *(branch(grid) for branch in self.atrous), pooled], 1)
        )


def concat_pooled(rows: Tensor, vectors: Tensor, layout: SiteLayout) -> Tensor:
    """Rows `[layout.num_sites, C]` and, behind their channels, their image's vector of `[B, P]`."""
    return torch.cat((rows, vectors[layout.image_of_row]), 1)


def linear_norm_relu(in_channels: int, channels: int) -> nn.Sequential:
    """1x1 convolution on rows, batch norm, ReLU."""
    linear = SelectiveLinear(in_channels, channels)
    return nn.Sequential(linear, nn.BatchNorm1d(channels), nn.ReLU(inplace=True))


def mean_by_area(rows: Tensor, layout: SiteLayout) -> Tensor:
    """Global average pooling `[N, C]` to `[B, C]`: a site weighs as many finest cells as its block spans.

    Exact at both ends: all-fine it is the mean of the dense fine network, all-coarse of the dense coarse one.
    """
    # a long sum: half precision would overflow or stop counting (bfloat16 at 256), so it runs in float32
    dtype, values = rows.dtype, rows.to(torch.promote_types(rows.dtype, torch.float32))
    areas = layout.areas.to(values.dtype)
    lattice, extra = slice(layout.num_lattice), slice(layout.num_lattice, None)
    shares = areas[lattice].view(layout.batch, 1, -1)
    with torch.autocast(rows.device.type, enabled=False):
        pooled = torch.bmm(shares, values[lattice].view(layout.batch, -1, rows.shape[1])).squeeze(1)
    if layout.num_extra:
        pooled = pooled.index_add(0, layout.image_of_row[extra], values[extra] * areas[extra, None])
    total = areas.new_zeros(layout.batch).index_add_(0, layout.image_of_row, areas)
    return (pooled / total[:, None]).to(dtype)
