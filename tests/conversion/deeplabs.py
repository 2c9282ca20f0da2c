"""Further sources' networks, see `networks.py`: VainF and CAD, smp, mmsegmentation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.conversion.networks import (
    Aspp,
    Network,
    ResNet,
    Separable,
    _fcn,
    conv,
    conv3x3,
    conv_bn_relu,
    rates_at,
    resize,
    shape,
)


class VainFHead(nn.Module):
    """deeplabv3; the dense 3x3 of networks run finer than trained may be dilated."""

    def __init__(self, inside: int, channels: int, classes: int, stride: int, kind: str) -> None:
        super().__init__()
        self.classifier = nn.Sequential(
            Aspp(inside, channels, rates_at(stride), kind),
            conv3x3(channels, channels, kind),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, classes, 1),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.classifier(features[3])


class VainFPlusHead(nn.Module):
    """deeplabv3plus."""

    def __init__(
        self, inside: int, low: int, channels: int, skip: int, classes: int, stride: int, kind: str
    ) -> None:
        super().__init__()
        self.project = conv_bn_relu(low, skip, 1)
        self.aspp = Aspp(inside, channels, rates_at(stride), kind)
        decoder = conv3x3(channels + skip, channels, kind)
        last = nn.Conv2d(channels, classes, 1)
        self.classifier = nn.Sequential(decoder, nn.BatchNorm2d(channels), nn.ReLU(), last)

    def forward(self, features: list[Tensor]) -> Tensor:
        low = self.project(features[0])
        return self.classifier(torch.cat([low, resize(self.aspp(features[3]), shape(low))], 1))


class FCNWrapper(nn.Module):
    """CAD's fcn."""

    def __init__(self, inside: int, classes: int) -> None:
        super().__init__()
        self.classifier = _fcn(inside, classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.classifier(features[3])


class VainF(Network):
    def __init__(
        self,
        head: str,
        backbone: ResNet,
        output_stride: int,
        kind: str = "plain",
        channels: int = 256,
        skip: int = 48,
        classes: int = 19,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        inside, low = backbone.channels, backbone.low_channels
        if head == "deeplabv3":
            self.classifier: nn.Module = VainFHead(inside, channels, classes, output_stride, kind)
        elif head == "fcn":
            self.classifier = FCNWrapper(inside, classes)
        else:
            self.classifier = VainFPlusHead(inside, low, channels, skip, classes, output_stride, kind)

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        return self.classifier(features)


class SmpV3(nn.Module):
    def __init__(self, inside: int, channels: int, rates: list[int], kind: str) -> None:
        super().__init__()
        self.aspp = Aspp(inside, channels, rates, kind)
        self.conv, self.bn = conv(channels, channels, 3), nn.BatchNorm2d(channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        return torch.relu(self.bn(self.conv(self.aspp(features[3]))))


class SmpV3Plus(nn.Module):
    def __init__(self, inside: int, low: int, channels: int, skip: int, rates: list[int], kind: str) -> None:
        super().__init__()
        aspp = Aspp(inside, channels, rates, kind)
        self.aspp = nn.Sequential(aspp, Separable(channels, channels), nn.BatchNorm2d(channels), nn.ReLU())
        self.block1 = conv_bn_relu(low, skip, 1)
        self.block2 = nn.Sequential(Separable(channels + skip, channels), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, features: list[Tensor]) -> Tensor:
        low = self.block1(features[0])
        up = resize(self.aspp(features[3]), shape(low), align_corners=True)
        return self.block2(torch.cat([up, low], 1))


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
        self.encoder = encoder
        inside, low = encoder.channels, encoder.low_channels
        if head == "deeplabv3":
            self.decoder: nn.Module = SmpV3(inside, channels, rates, kind)
        else:
            self.decoder = SmpV3Plus(inside, low, channels, skip, rates, kind)
        self.segmentation_head = nn.Sequential(nn.Conv2d(channels, classes, 1))

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        return self.segmentation_head(self.decoder(features))


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


class MmsegAuxiliary(nn.Module):
    def __init__(self, inside: int, classes: int) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(inside // 4, classes, 1)
        self.convs = nn.Sequential(ConvModule(inside, inside // 4, 3))


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
        inside, plus = backbone.channels, head == "deeplabv3plus"
        low = backbone.low_channels
        self.decode_head = MmsegHead(inside, low, channels, skip if plus else None, classes, output_stride)
        self.auxiliary_head = MmsegAuxiliary(inside // 2, classes)

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        return self.decode_head(features)
