"""Heads: rows of the last stage to logits. What is 1x1 or evenly spaced runs on rows, before densify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_seg.models.aspp import ASPP
from sparse_seg.models.upsample import upsample_logits
from sparse_seg.sparse import SiteLayout, densify

FINEST_DENSE_STRIDE = 8  # of dense networks, in px
LOW_LEVEL_STRIDE = 4  # of layer1, whose grid `deeplabv3plus` reads and writes


@dataclass(frozen=True)
class HeadOptions:
    """What heads are built from; each takes what concerns it.

    Args:
        in_channels: of layer4's rows; low_level_in_channels: of layer1's.
        num_classes: K.
        channels: of the head; None for its own default.
        spacings: of ASPP's 3x3 branches, px.
        exchange, engine: of 3x3 convolutions on rows, see `SelectiveConv2d`.
        trained_stride: output stride that the head was trained at, px.
        aspp_separable, separable: of ASPP's branches and of the dense 3x3 convolutions, see `SEPARABLE`.
        aspp_projection: see `ASPP`.
        refine: whether a dense 3x3 follows ASPP.
        low_level_channels: of the low-level skip after its 1x1 projection.
        decoder_convs: 3x3 convolutions after the skip.
        align_corners: of the upsampling to the skip's grid.
    """

    in_channels: int
    num_classes: int
    spacings: Sequence[int]
    low_level_in_channels: int = 0
    channels: int | None = None
    exchange: str = "linear"
    engine: str = "auto"
    trained_stride: int = 8
    aspp_separable: str = "none"
    separable: str = "none"
    aspp_projection: bool = True
    refine: bool = True
    low_level_channels: int = 48
    decoder_convs: int = 1
    align_corners: bool = False


def at_dense_spacing(module: nn.Module, grid: Tensor, stride: int) -> Tensor:
    """Run dense 3x3 convolutions on a grid `[B, C, H, W]`; on one finer than stride 8 with stride 8's taps.

    Dense networks have them one cell apart, at 8 px or more. On a finer grid that is several cells: cells of
    other phases are other grids.
    """
    phases = FINEST_DENSE_STRIDE // stride
    if phases <= 1:
        return module(grid)
    parts = [(slice(y, None, phases), slice(x, None, phases)) for y in range(phases) for x in range(phases)]
    first, *others = (module(grid[:, :, y, x]) for y, x in parts)
    out = grid.new_empty(grid.shape[0], first.shape[1], *grid.shape[2:])
    for (y, x), part in zip(parts, (first, *others), strict=True):
        out[:, :, y, x] = part
    return out


class RowHead(nn.Module):
    """A head in two parts: `neck` on rows, `decode` on the grid that densify makes of them."""

    refine: nn.Sequential
    classifier: nn.Conv2d

    def forward(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        """Rows `[layout.num_run, in_channels]` to logits `[B, K, H, W]` on the layout's finest grid."""
        return self.decode(densify(self.neck(rows, layout), layout), layout.stride)

    def neck(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        """What runs on rows, `[layout.num_run, in_channels]` to `[layout.num_sites, channels]`."""
        raise NotImplementedError

    def decode(self, grid: Tensor, stride: int) -> Tensor:
        """What runs on the densified grid, `[B, channels, H, W]` to `[B, K, H, W]`."""
        return self.classifier(at_dense_spacing(self.refine, grid, stride))


class LiteHead(RowHead):
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

    def neck(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        return layout.complete(self.reduce(rows), layout, self)


class DeepLabV3Head(RowHead):
    """ASPP on rows, densify, dense 3x3, classifier (torchvision's DeepLabHead).

    Args:
        channels: of ASPP and of the 3x3.
    """

    def __init__(self, options: HeadOptions, channels: int) -> None:
        super().__init__()
        self.aspp = _aspp(options, channels)
        self.refine = _refine(options, self.aspp, channels)
        self.classifier = nn.Conv2d(channels, options.num_classes, 1)

    def neck(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        return self.aspp(rows, layout)


class DeepLabV3PlusHead(nn.Module):
    """ASPP on rows, densify, upsampling to stride 4, low-level skip, 3x3 decoder (Chen et al., ECCV 2018).

    Args:
        channels: of ASPP and of the decoder.
    """

    uses_low_level = True

    def __init__(self, options: HeadOptions, channels: int) -> None:
        super().__init__()
        self.trained_stride, self.align_corners = options.trained_stride, options.align_corners
        self.aspp = _aspp(options, channels)
        self.refine = _refine(options, self.aspp, channels)
        self.low_level = nn.Sequential(
            nn.Conv2d(options.low_level_in_channels, options.low_level_channels, 1, bias=False),
            nn.BatchNorm2d(options.low_level_channels),
            nn.ReLU(inplace=True),
        )
        widths = [channels + options.low_level_channels] + [channels] * options.decoder_convs
        self.decoder = nn.Sequential(
            *(_conv_bn_relu(inside, channels, options.separable) for inside in widths[:-1])
        )
        self.classifier = nn.Conv2d(widths[-1], options.num_classes, 1)

    def forward(self, rows: Tensor, layout: SiteLayout, low_level: Tensor) -> Tensor:
        """Rows `[layout.num_run, in_channels]`, layer1's grid `[B, C, H, W]` to logits at stride 4."""
        grid = densify(self.aspp(rows, layout), layout)
        grid = at_dense_spacing(self.refine, grid, layout.stride)
        return self.classifier(self.decoder(self.join(grid, layout.stride, low_level)))

    def join(self, grid: Tensor, stride: int, low_level: Tensor) -> Tensor:
        """A grid `[B, C, h, w]` at `stride` px beside the projected skip, on the grid of the skip."""
        size, unit = (low_level.shape[2], low_level.shape[3]), LOW_LEVEL_STRIDE
        trained = self.trained_stride // unit
        grid = upsample_logits(grid, size, stride // unit, trained, self.align_corners)
        return torch.cat([grid, self.low_level(low_level)], 1)


def _aspp(options: HeadOptions, channels: int) -> ASPP:
    return ASPP(
        options.in_channels,
        channels,
        options.spacings,
        options.exchange,
        options.engine,
        separable=options.aspp_separable,
        projection=options.aspp_projection,
    )


def _refine(options: HeadOptions, aspp: ASPP, channels: int) -> nn.Sequential:
    if not options.refine:
        return nn.Sequential()
    return _conv_bn_relu(aspp.out_channels, channels, options.separable)


class FCNHead(RowHead):
    """Densify, dense 3x3, classifier (Long et al., CVPR 2015); in training also on layer3."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.refine = _conv_bn_relu(in_channels, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def neck(self, rows: Tensor, layout: SiteLayout) -> Tensor:
        return layout.complete(rows, layout, self)

    def decode(self, grid: Tensor, stride: int) -> Tensor:
        return self.classifier(self.dropout(at_dense_spacing(self.refine, grid, stride)))


def _conv_bn_relu(in_channels: int, channels: int, separable: str = "none") -> nn.Sequential:
    """Dense 3x3, batch norm, ReLU; or the depthwise and 1x1 convolutions that stand for the 3x3."""
    last = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    if separable == "none":
        return nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), *last)
    depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
    between = [nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True)] if separable == "normed" else []
    pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
    return nn.Sequential(depthwise, *between, pointwise, *last)


def _lite(options: HeadOptions) -> nn.Module:
    return LiteHead(options.in_channels, options.channels or 128, options.num_classes)


def _fcn(options: HeadOptions) -> nn.Module:
    channels = options.channels or max(options.in_channels // 4, 1)
    return FCNHead(options.in_channels, channels, options.num_classes)


HEADS: dict[str, Callable[[HeadOptions], nn.Module]] = {
    "lite": _lite,
    "deeplabv3": lambda options: DeepLabV3Head(options, options.channels or 256),
    "deeplabv3plus": lambda options: DeepLabV3PlusHead(options, options.channels or 256),
    "fcn": _fcn,
}
