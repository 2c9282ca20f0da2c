"""DeepLab's heads: ASPP on rows, and with DeepLabV3+ a decoder that reads layer1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_seg.models.aspp import ASPP
from sparse_seg.models.forms import grid_macs
from sparse_seg.models.heads import LOW_LEVEL_STRIDE, Head, HeadOptions, at_dense_spacing, conv_norm_relu
from sparse_seg.models.upsample import upsample_logits
from sparse_seg.sparse import SiteLayout, Step


class DeepLabV3Head(Head):
    """ASPP on rows, densify, dense 3x3, classifier (torchvision's DeepLabHead); 256 channels by default."""

    NECK = ("aspp",)

    def __init__(self, options: HeadOptions) -> None:
        super().__init__()
        channels = options.channels or 256
        self.aspp = _aspp(options, channels)
        self.refine = _refine(options, self.aspp, channels)
        self.classifier = nn.Conv2d(channels, options.num_classes, 1)

    def neck(self, rows: Tensor, step: Step) -> Tensor:
        return self.aspp(rows, step)


class DeepLabV3PlusHead(Head):
    """ASPP on rows, densify, upsampling to stride 4, low-level skip, 3x3 decoder (Chen et al., ECCV 2018)."""

    NECK = ("aspp",)
    reads_low_level = True

    def __init__(self, options: HeadOptions) -> None:
        super().__init__()
        channels = options.channels or 256
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
            *(conv_norm_relu(inside, channels, options.separable) for inside in widths[:-1])
        )
        self.classifier = nn.Conv2d(widths[-1], options.num_classes, 1)

    def neck(self, rows: Tensor, step: Step) -> Tensor:
        return self.aspp(rows, step)

    def decode(self, grid: Tensor, stride: int, low_level: Tensor | None = None) -> Tensor:
        """`[B, channels, h, w]` at `stride` px and layer1's grid `[B, C, H, W]` to logits `[B, K, H, W]`."""
        assert low_level is not None
        grid = at_dense_spacing(self.refine, grid, stride)
        size, unit = (low_level.shape[2], low_level.shape[3]), LOW_LEVEL_STRIDE
        trained = self.trained_stride // unit
        grid = upsample_logits(grid, size, stride // unit, trained, self.align_corners)
        return self.classifier(self.decoder(torch.cat([grid, self.low_level(low_level)], 1)))

    def decode_macs(self, layout: SiteLayout, low_level: SiteLayout) -> int:
        at_low_level = (self.low_level, self.decoder, self.classifier)
        macs = [grid_macs(part, low_level.num_sites) for part in at_low_level]
        return sum(macs) + grid_macs(self.refine, layout.batch * layout.size[0] * layout.size[1])


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
    return conv_norm_relu(aspp.out_channels, channels, options.refine_separable or options.separable)
