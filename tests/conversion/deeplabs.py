"""Further sources' networks, see `networks.py`: VainF and CAD, smp, mmsegmentation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.conversion.networks import (
    Aspp,
    Network,
    ResNet,
    Separable,
    conv,
    conv3x3,
    conv_bn_relu,
    fcn_head,
    rates_at,
    resize,
    shape,
)


class VainF(Network):
    """deeplabv3 and deeplabv3plus, and CAD's fcn; the dense 3x3 of networks run finer than trained may be
    dilated."""

    def __init__(
        self,
        head: str,
        backbone: ResNet,
        stride: int,
        kind: str = "plain",
        channels: int = 256,
        skip: int = 48,
        classes: int = 19,
    ) -> None:
        super().__init__()
        inside, own = backbone.channels, nn.Module()
        aspp = Aspp(inside, channels, rates_at(stride), kind)
        norm, last = nn.BatchNorm2d(channels), nn.Conv2d(channels, classes, 1)
        if head == "fcn":
            own.classifier = fcn_head(inside, classes)
        elif head == "deeplabv3":
            own.classifier = nn.Sequential(aspp, conv3x3(channels, channels, kind), norm, nn.ReLU(), last)
        else:
            own.project, own.aspp = conv_bn_relu(backbone.low_channels, skip, 1), aspp
            own.classifier = nn.Sequential(conv3x3(channels + skip, channels, kind), norm, nn.ReLU(), last)
        self.backbone, self.classifier = backbone, own

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        own: Any = self.classifier
        if not hasattr(own, "project"):
            return own.classifier(features[3])
        low = own.project(features[0])
        return own.classifier(torch.cat([low, resize(own.aspp(features[3]), shape(low))], 1))


class Smp(Network):
    """`DeepLabV3` and `DeepLabV3Plus`. For images that its strides do not divide, which smp refuses, the
    upsampling goes to the size of the image."""

    align_corners = True

    def __init__(
        self,
        head: str,
        encoder: ResNet,
        rates: list[int],
        kind: str = "plain",
        channels: int = 256,
        skip: int = 48,
        classes: int = 19,
    ) -> None:
        super().__init__()
        own, both = nn.Module(), channels + skip
        aspp = Aspp(encoder.channels, channels, rates, kind)
        if head == "deeplabv3":
            own.aspp, own.conv, own.bn = aspp, conv(channels, channels, 3), nn.BatchNorm2d(channels)
        else:
            own.aspp = nn.Sequential(aspp, Separable(channels, channels), nn.BatchNorm2d(channels), nn.ReLU())
            own.block1 = conv_bn_relu(encoder.low_channels, skip, 1)
            own.block2 = nn.Sequential(Separable(both, channels), nn.BatchNorm2d(channels), nn.ReLU())
        self.encoder, self.decoder = encoder, own
        self.segmentation_head = nn.Sequential(nn.Conv2d(channels, classes, 1))

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        own: Any = self.decoder
        grid = own.aspp(features[3])
        if not hasattr(own, "block1"):
            return self.segmentation_head(torch.relu(own.bn(own.conv(grid))))
        low = own.block1(features[0])
        up = resize(grid, shape(low), align_corners=True)
        return self.segmentation_head(own.block2(torch.cat([up, low], 1)))


class ConvModule(nn.Module):
    """mmcv's: convolution, norm, ReLU."""

    def __init__(self, inside: int, outside: int, kernel: int, dilation: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = conv(inside, outside, kernel, 1, dilation, groups)
        self.bn = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class SeparableConvModule(nn.Module):
    """mmcv's depthwise separable module: norm and ReLU after both parts."""

    def __init__(self, inside: int, outside: int, dilation: int = 1) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(inside, inside, 3, dilation, inside)
        self.pointwise_conv = ConvModule(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


class MmsegPool(nn.Sequential):
    def __init__(self, inside: int, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), ConvModule(inside, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).expand(-1, -1, *x.shape[2:])


class MmsegHead(nn.Module):
    """ASPPHead and, with a skip, DepthwiseSeparableASPPHead: image pooling first, a 3x3 over all branches."""

    def __init__(
        self, inside: int, low: int, channels: int, skip: int | None, classes: int, stride: int
    ) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, classes, 1)
        self.image_pool = MmsegPool(inside, channels)
        branches: list[nn.Module] = [ConvModule(inside, channels, 1)]
        for rate in rates_at(stride):
            plain = ConvModule(inside, channels, 3, rate)
            branches.append(plain if skip is None else SeparableConvModule(inside, channels, rate))
        self.aspp_modules = nn.ModuleList(branches)
        self.bottleneck, self.plus = ConvModule(5 * channels, channels, 3), skip is not None
        if skip is not None:
            self.c1_bottleneck = ConvModule(low, skip, 1)
            self.sep_bottleneck = nn.Sequential(
                SeparableConvModule(channels + skip, channels), SeparableConvModule(channels, channels)
            )

    def forward(self, features: list[Tensor]) -> Tensor:
        x = features[3]
        branches = [self.image_pool(x), *(module(x) for module in self.aspp_modules)]
        out = self.bottleneck(torch.cat(branches, 1))
        if self.plus:
            low = self.c1_bottleneck(features[0])
            out = self.sep_bottleneck(torch.cat([resize(out, shape(low)), low], 1))
        return self.conv_seg(out)


class Mmseg(Network):
    def __init__(
        self,
        head: str,
        backbone: ResNet,
        output_stride: int,
        channels: int = 512,
        skip: int = 48,
        classes: int = 19,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        inside, low = backbone.channels, backbone.low_channels
        taken = skip if head == "deeplabv3plus" else None
        self.decode_head = MmsegHead(inside, low, channels, taken, classes, output_stride)
        self.auxiliary_head = nn.Module()
        self.auxiliary_head.conv_seg = nn.Conv2d(inside // 8, classes, 1)
        self.auxiliary_head.convs = nn.Sequential(ConvModule(inside // 2, inside // 8, 3))

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        return self.decode_head(features)
