"""Heads: a backbone's features to logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparse_seg.ops.upsample import upsample_logits

DENSE_SPACING = 8  # px between the taps of dense 3x3 convolutions, at least: one cell at output stride 8
LOW_LEVEL_STRIDE = 4  # of the first feature, px


class Head(nn.Module):
    """The base of all: by default `decode` of the last feature, then the classifier.

    Args of all heads:
        channels: of the features, finest first.
        num_classes: K.
        output_stride: of the last feature, px.
        trained_stride: output stride that the head was trained at, px.
        head_channels: None for a head's own default.

    Attributes:
        pools: whether it pools each image.
        reads_low_level: whether it reads the first feature and gives logits at its stride.
    """

    classifier: nn.Conv2d
    pools: ClassVar[bool] = False
    reads_low_level: ClassVar[bool] = False

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features `[B, C, h, w]` to logits `[B, K, h, w]`."""
        return self.classifier(self.decode(features[-1]))

    def decode(self, grid: Tensor) -> Tensor:
        raise NotImplementedError


class LiteHead(Head):
    """1x1 reduction, depthwise 3x3 and 1x1, classifier; 128 channels by default."""

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        output_stride: int = 8,
        head_channels: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        width, dilation = head_channels or 128, dense_dilation(output_stride)
        self.reduce = conv_norm_relu(channels[-1], width, 1)
        self.refine = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, dilation, dilation, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout2d(dropout),
        )
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def decode(self, grid: Tensor) -> Tensor:
        return self.refine(self.reduce(grid))


class FCNHead(Head):
    """3x3, classifier (Long et al., CVPR 2015); by default with a quarter of the input's channels."""

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        output_stride: int = 8,
        head_channels: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        width = head_channels or max(channels[-1] // 4, 1)
        self.refine = conv_norm_relu(channels[-1], width, 3, dense_dilation(output_stride))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def decode(self, grid: Tensor) -> Tensor:
        return self.dropout(self.refine(grid))

    def at(self, grid: Tensor, output_stride: int) -> Tensor:
        """Logits of a feature `[B, C, h, w]` at any output stride, px, whatever it was made for."""
        convolution: Any = self.refine[0]
        convolution.dilation = convolution.padding = (dense_dilation(output_stride),) * 2
        return self.classifier(self.decode(grid))


class LRASPPHead(Head):
    """1x1 gated by the image's mean, and a 1x1 of the first feature (Howard et al., ICCV 2019).

    As upsampling and 1x1 commute, logits are upsampled in place of channels: the same values.
    """

    pools = True
    reads_low_level = True

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        output_stride: int = 8,
        trained_stride: int = 8,
        head_channels: int | None = None,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        width = head_channels or 128
        self.upsample = ToLowLevel(output_stride, trained_stride, align_corners)
        self.cbr = conv_norm_relu(channels[-1], width, 1)
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels[-1], width, 1, bias=False), nn.Sigmoid()
        )
        self.low_classifier = nn.Conv2d(channels[0], num_classes, 1, bias=False)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        low_level, grid = features[0], features[-1]
        logits = self.classifier(self.cbr(grid) * self.scale(grid))
        return self.upsample(logits, low_level) + self.low_classifier(low_level)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al., 2017), by torchvision's names.

    A 1x1 branch, 3x3 branches with wide dilations, image pooling; then a 1x1 projection of all.

    Args:
        inside, channels: of the input and of each branch.
        dilations: of the 3x3 branches.
        separable: of the 3x3 branches: `none`; `linear`, depthwise and 1x1; `normed`, with norm and ReLU
            between the two (Chen et al., ECCV 2018).
        projection: without it the output is the branches side by side (mmsegmentation projects by a 3x3).
    """

    def __init__(
        self, inside: int, channels: int, dilations: Sequence[int], separable: str, projection: bool
    ) -> None:
        super().__init__()
        pooling = conv_norm_relu(inside, channels, 1)
        self.convs = nn.ModuleList(
            [
                conv_norm_relu(inside, channels, 1),
                *(_atrous(inside, channels, dilation, separable) for dilation in dilations),
                nn.Sequential(nn.AdaptiveAvgPool2d(1), *pooling),
            ]
        )
        self.out_channels = channels if projection else channels * len(self.convs)
        self.project = nn.Sequential()
        if projection:
            joined = conv_norm_relu(channels * len(self.convs), channels, 1)
            self.project = nn.Sequential(*joined, nn.Dropout(0.5))

    def forward(self, grid: Tensor) -> Tensor:
        """`[B, inside, H, W]` to `[B, out_channels, H, W]`."""
        *local, pooling = self.convs
        pooled = pooling(grid).expand(-1, -1, *grid.shape[2:])
        return self.project(torch.cat([*(branch(grid) for branch in local), pooled], 1))


class DeepLabV3Head(Head):
    """ASPP, 3x3, classifier (torchvision's DeepLabHead); 256 channels by default.

    Args:
        aspp_rates: dilations at `trained_stride`.
        aspp_separable, aspp_projection: see `ASPP`.
        refine: whether a 3x3 follows ASPP; separable, refine_separable: how it is made, the second first.
    """

    pools = True

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        output_stride: int = 8,
        trained_stride: int = 8,
        head_channels: int | None = None,
        aspp_rates: Sequence[int] = (12, 24, 36),
        aspp_separable: str = "none",
        aspp_projection: bool = True,
        refine: bool = True,
        separable: str = "none",
        refine_separable: str | None = None,
    ) -> None:
        super().__init__()
        width = head_channels or 256
        dilations = [rate * trained_stride // output_stride for rate in aspp_rates]
        self.aspp = ASPP(channels[-1], width, dilations, aspp_separable, aspp_projection)
        self.refine = nn.Sequential()
        if refine:
            kind, dilation = refine_separable or separable, dense_dilation(output_stride)
            self.refine = conv_norm_relu(self.aspp.out_channels, width, 3, dilation, kind)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def decode(self, grid: Tensor) -> Tensor:
        return self.refine(self.aspp(grid))


class DeepLabV3PlusHead(DeepLabV3Head):
    """ASPP, upsampling to stride 4, low-level skip, 3x3 decoder (Chen et al., ECCV 2018).

    Args:
        low_level_channels: of the skip after its 1x1; decoder_convs: 3x3 convolutions after it.
        align_corners: of the upsampling.
        options: of `DeepLabV3Head`.
    """

    reads_low_level = True

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        output_stride: int = 8,
        trained_stride: int = 8,
        separable: str = "none",
        low_level_channels: int = 48,
        decoder_convs: int = 1,
        align_corners: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(channels, num_classes, output_stride, trained_stride, separable=separable, **options)
        width = self.classifier.in_channels
        self.upsample = ToLowLevel(output_stride, trained_stride, align_corners)
        self.low_level = conv_norm_relu(channels[0], low_level_channels, 1)
        widths = [width + low_level_channels, *[width] * (decoder_convs - 1)]
        self.decoder = nn.Sequential(*(conv_norm_relu(inside, width, 3, 1, separable) for inside in widths))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        low_level = features[0]
        grid = self.upsample(self.decode(features[-1]), low_level)
        return self.classifier(self.decoder(torch.cat([grid, self.low_level(low_level)], 1)))


class ToLowLevel(nn.Module):
    """Bilinear upsampling to the first feature's grid, with the offset that it was trained with."""

    def __init__(self, output_stride: int, trained_stride: int, align_corners: bool) -> None:
        super().__init__()
        self.output_stride, self.trained_stride = output_stride, trained_stride
        self.align_corners = align_corners

    def forward(self, grid: Tensor, low_level: Tensor) -> Tensor:
        """`[B, C, h, w]` to `[B, C, H, W]` of the feature `[B, I, H, W]`."""
        size = (low_level.shape[2], low_level.shape[3])
        stride, trained = (one // LOW_LEVEL_STRIDE for one in (self.output_stride, self.trained_stride))
        return upsample_logits(grid, size, stride, trained, self.align_corners)


def dense_dilation(output_stride: int) -> int:
    """Of a 3x3 that was trained one cell apart at output stride 8 or more: the same distance on finer
    grids."""
    return max(1, DENSE_SPACING // output_stride)


def _atrous(inside: int, channels: int, dilation: int, separable: str) -> nn.Sequential:
    """A separable one has its convolutions in a module of their own."""
    *convolutions, norm, relu = conv_norm_relu(inside, channels, 3, dilation, separable)
    return nn.Sequential(*convolutions if separable == "none" else [nn.Sequential(*convolutions)], norm, relu)


def conv_norm_relu(
    inside: int, channels: int, kernel: int, dilation: int = 1, separable: str = "none"
) -> nn.Sequential:
    """A convolution that keeps its size, or the depthwise and 1x1 ones that stand for it; norm; ReLU."""
    padding = kernel // 2 * dilation
    if separable == "none":
        layers: list[nn.Module] = [nn.Conv2d(inside, channels, kernel, 1, padding, dilation, bias=False)]
    else:
        between = [nn.BatchNorm2d(inside), nn.ReLU(inplace=True)] if separable == "normed" else []
        depthwise = nn.Conv2d(inside, inside, kernel, 1, padding, dilation, inside, bias=False)
        layers = [depthwise, *between, nn.Conv2d(inside, channels, 1, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
