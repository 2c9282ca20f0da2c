"""Heads: rows of the last stage to logits. What is 1x1 or evenly spaced runs on rows, before densify."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.sparse import SelectiveConv2d, SiteLayout, densify


class LiteHead(nn.Module):
    """1x1 reduction on rows, densify, depthwise 3x3 and 1x1, classifier.

    Args:
        in_channels, channels, num_classes: widths of rows, of the head, and K.
        dropout: share of whole channels dropped before the classifier in training.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
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
        """Rows `[N, in_channels]` to logits `[B, K, H, W]` on the layout's finest grid."""
        return self.classifier(self.refine(densify(self.reduce(rows), layout)))


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
            nn.Linear((2 + len(spacings)) * channels, channels, bias=False),
            nn.BatchNorm1d(channels),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
        )

    def forward(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        """Rows `[N, in_channels]` to `[N, channels]`."""
        branches = [self.point(rows)]
        for conv, norm in zip(self.atrous, self.atrous_bn, strict=True):
            branches.append(F.relu(norm(conv(rows, layout, layout)), inplace=True))
        branches.append(self.pool(mean_by_area(rows, layout))[layout.image_of_row])
        return self.project(torch.cat(branches, 1))


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
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        spacings: Sequence[int],
        exchange: str,
        engine: str = "auto",
    ) -> None:
        super().__init__()
        self.aspp = ASPP(in_channels, channels, spacings, exchange, engine)
        self.refine = _conv_bn_relu(channels, channels)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        """Rows `[N, in_channels]` to logits `[B, K, H, W]` on the layout's finest grid."""
        return self.classifier(self.refine(densify(self.aspp(rows, layout), layout)))


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
) -> nn.Module:
    return LiteHead(in_channels, 128 if channels is None else channels, num_classes)


def _deeplabv3(
    in_channels: int,
    num_classes: int,
    channels: int | None,
    spacings: Sequence[int],
    exchange: str,
    engine: str,
) -> nn.Module:
    channels = 256 if channels is None else channels
    return DeepLabV3Head(in_channels, channels, num_classes, spacings, exchange, engine)


HEADS: dict[str, Callable[[int, int, int | None, Sequence[int], str, str], nn.Module]] = {
    "lite": _lite,
    "deeplabv3": _deeplabv3,
}
