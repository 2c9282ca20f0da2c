"""Heads: rows of the last stage to logits. What is 1x1 or evenly spaced runs on rows, before densify."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.sparse import SelectiveConv2d, SiteLayout, densify


def at_trained_spacing(module: nn.Module, grid: Tensor, stride: int, trained_stride: int) -> Tensor:
    """Run 3x3 convolutions on a grid `[B, C, H, W]` with the taps as far apart, in pixels, as in training.

    On a grid finer than the trained one a tap is several cells away: cells of other phases are other grids.
    On a coarser grid taps are one cell apart, as in the dense network of that stride.
    """
    phases = trained_stride // stride
    if phases <= 1:
        return module(grid)
    parts = [(slice(y, None, phases), slice(x, None, phases)) for y in range(phases) for x in range(phases)]
    first, *others = (module(grid[:, :, y, x]) for y, x in parts)
    out = grid.new_empty(grid.shape[0], first.shape[1], *grid.shape[2:])
    for (y, x), part in zip(parts, (first, *others), strict=True):
        out[:, :, y, x] = part
    return out


class LiteHead(nn.Module):
    """1x1 reduction on rows, densify, depthwise 3x3 and 1x1, classifier.

    Args:
        in_channels, channels, num_classes: widths of rows, of the head, and K.
        trained_stride: see `at_trained_spacing`.
        dropout: share of whole channels dropped before the classifier in training.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        trained_stride: int = 8,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.trained_stride = trained_stride
        self.reduce = nn.Sequential(
            nn.Linear(in_channels, channels, bias=False), nn.BatchNorm1d(channels), nn.ReLU(inplace=True)
        )
        self.refine = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Dropout2d(dropout),
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        """Rows `[layout.num_run, in_channels]` to logits `[B, K, H, W]` on the layout's finest grid."""
        return self.decode(densify(self.neck(rows, layout), layout), layout.stride)

    def neck(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        """What runs on rows, `[layout.num_run, in_channels]` to `[layout.num_sites, channels]`."""
        return layout.complete(self.reduce(rows), layout, self)

    def decode(self, grid: Tensor, stride: int) -> Tensor:
        """What runs on the densified grid, `[B, channels, H, W]` to `[B, K, H, W]`."""
        return self.classifier(at_trained_spacing(self.refine, grid, stride, self.trained_stride))


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
    """Atrous spatial pyramid pooling on rows (Chen et al., "Rethinking Atrous Convolution", 2017).

    Args:
        spacings: distance between taps of each 3x3 branch, in pixels: rate x trained output stride.
        exchange, engine: of the 3x3 branches, see `SelectiveConv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        spacings: Sequence[int],
        exchange: str,
        engine: str = "auto",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.point = nn.Sequential(
            nn.Linear(in_channels, channels, bias=False), nn.BatchNorm1d(channels), nn.ReLU(inplace=True)
        )
        self.atrous = nn.ModuleList(
            SelectiveConv2d(in_channels, channels, s, exchange, engine) for s in spacings
        )
        self.atrous_bn = nn.ModuleList(nn.BatchNorm1d(channels) for _ in spacings)
        self.pool = nn.Sequential(
            nn.Linear(in_channels, channels, bias=False), nn.BatchNorm1d(channels), nn.ReLU(inplace=True)
        )
        self.project = nn.Sequential(
            PooledLinear((1 + len(spacings)) * channels, channels, channels),
            nn.BatchNorm1d(channels),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
        )

    def forward(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        """Rows `[layout.num_run, in_channels]` to `[N, channels]`."""
        branches = [self.point(rows)]
        for conv, norm in zip(self.atrous, self.atrous_bn, strict=True):
            branches.append(F.relu(norm(conv(rows, layout, layout)), inplace=True))
        pooled = self.pool(mean_by_area(layout.complete(rows, layout, self), layout))
        linear, *rest = self.project
        return nn.Sequential(*rest)(linear(torch.cat(branches, 1), pooled, layout))


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


class DeepLabV3Head(nn.Module):
    """ASPP on rows, densify, dense 3x3, classifier (torchvision's DeepLabHead).

    Args:
        in_channels, channels, num_classes: widths of rows, of the head, and K.
        spacings: see `ASPP`.
        exchange, engine: of the 3x3 convolutions on rows, see `SelectiveConv2d`.
        trained_stride: see `at_trained_spacing`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        spacings: Sequence[int],
        exchange: str,
        engine: str = "auto",
        trained_stride: int = 8,
    ) -> None:
        super().__init__()
        self.trained_stride = trained_stride
        self.aspp = ASPP(in_channels, channels, spacings, exchange, engine)
        self.refine = _conv_bn_relu(channels, channels)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        """Rows `[layout.num_run, in_channels]` to logits `[B, K, H, W]` on the layout's finest grid."""
        return self.decode(densify(self.neck(rows, layout), layout), layout.stride)

    def neck(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        """What runs on rows, `[layout.num_run, in_channels]` to `[layout.num_sites, channels]`."""
        return self.aspp(rows, layout)

    def decode(self, grid: Tensor, stride: int) -> Tensor:
        """What runs on the densified grid, `[B, channels, H, W]` to `[B, K, H, W]`."""
        return self.classifier(at_trained_spacing(self.refine, grid, stride, self.trained_stride))


class FCNHead(nn.Module):
    """Densify, dense 3x3, classifier (Long et al., CVPR 2015): the auxiliary head on layer3 in training."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.refine = _conv_bn_relu(in_channels, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        """Rows `[N, in_channels]` to logits `[B, K, H, W]` on the layout's finest grid."""
        return self.classifier(self.dropout(self.refine(densify(rows, layout))))


def _conv_bn_relu(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )


def _lite(
    in_channels: int,
    num_classes: int,
    channels: int | None,
    spacings: Sequence[int],
    exchange: str,
    engine: str,
    trained_stride: int,
) -> nn.Module:
    return LiteHead(in_channels, 128 if channels is None else channels, num_classes, trained_stride)


def _deeplabv3(
    in_channels: int,
    num_classes: int,
    channels: int | None,
    spacings: Sequence[int],
    exchange: str,
    engine: str,
    trained_stride: int,
) -> nn.Module:
    channels = 256 if channels is None else channels
    return DeepLabV3Head(in_channels, channels, num_classes, spacings, exchange, engine, trained_stride)


HEADS: dict[str, Callable[[int, int, int | None, Sequence[int], str, str, int], nn.Module]] = {
    "lite": _lite,
    "deeplabv3": _deeplabv3,
}
