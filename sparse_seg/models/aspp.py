"""Atrous spatial pyramid pooling on rows (Chen et al., "Rethinking Atrous Convolution", 2017).

Its rates are even, so that its taps stay on the lattice and P1 to P3 hold (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.sparse import SelectiveConv2d, SelectiveDepthwiseConv2d, SiteLayout

# what stands in place of a 3x3 convolution: itself; depthwise and 1x1; depthwise, norm, ReLU and 1x1
SEPARABLE = ("none", "linear", "normed")


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
        self.pointwise = nn.Linear(in_channels, out_channels, bias=False)

    def forward(self, rows: Tensor, src: SiteLayout, dst: SiteLayout) -> Tensor:
        """Rows `[src.num_run, I]` to `[dst.num_run, O]`."""
        out = self.depthwise(rows, src, dst)
        return self.pointwise(out if self.norm is None else F.relu(self.norm(out), inplace=True))


class PooledLinear(nn.Linear):
    """A linear layer without bias on rows `[n, C]` and, behind their channels, a vector `[B, P]` per image.

    The vector's share of the weight is multiplied once an image. Multiply-adds are counted as usual, as if
    the vector stood in every row.
    """

    def __init__(self, in_channels: int, pooled_channels: int, out_channels: int) -> None:
        super().__init__(in_channels + pooled_channels, out_channels, bias=False)

    def forward(self, rows: Tensor, pooled: Tensor, layout: SiteLayout) -> Tensor:  # type: ignore[override]
        """`[layout.num_run, C]` and `[B, P]` to `[layout.num_sites, O]`: known rows change, too."""
        channels = rows.shape[1]
        local = layout.complete(F.linear(rows, self.weight[:, :channels]), layout, self)
        return local + F.linear(pooled, self.weight[:, channels:])[layout.image_of_row]


class ASPP(nn.Module):
    """A 1x1 branch, 3x3 branches with wide spacings, image pooling; then a 1x1 projection of all.

    Args:
        spacings: distance between taps of each 3x3 branch, in pixels: rate x trained output stride.
        exchange, engine: of the 3x3 branches, see `SelectiveConv2d`.
        separable: of the 3x3 branches, one of `SEPARABLE`.
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

        self.point = _linear_bn_relu(in_channels, channels)
        self.atrous = nn.ModuleList(map(atrous, spacings))
        self.atrous_bn = nn.ModuleList(nn.BatchNorm1d(channels) for _ in spacings)
        self.pool = _linear_bn_relu(in_channels, channels)
        self.project, self.out_channels = None, (2 + len(spacings)) * channels
        if projection:
            self.project = nn.Sequential(
                PooledLinear(self.out_channels - channels, channels, channels),
                nn.BatchNorm1d(channels),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
            )
            self.out_channels = channels

    def forward(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        """Rows `[layout.num_run, in_channels]` to `[layout.num_sites, out_channels]`."""
        branches = [self.point(rows)]
        for conv, norm in zip(self.atrous, self.atrous_bn, strict=True):
            branches.append(F.relu(norm(conv(rows, layout, layout)), inplace=True))
        pooled = self.pool(mean_by_area(layout.complete(rows, layout, self), layout))
        local = torch.cat(branches, 1)
        if self.project is None:
            return beside(layout.complete(local, layout, self.pool), pooled, layout)
        linear, *rest = self.project
        return nn.Sequential(*rest)(linear(local, pooled, layout))


def beside(rows: Tensor, vectors: Tensor, layout: SiteLayout) -> Tensor:
    """Rows `[layout.num_sites, C]` and, behind their channels, their image's vector of `[B, P]`."""
    return torch.cat((rows, vectors[layout.image_of_row]), 1)


def _linear_bn_relu(in_channels: int, channels: int) -> nn.Sequential:
    linear = nn.Linear(in_channels, channels, bias=False)
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
