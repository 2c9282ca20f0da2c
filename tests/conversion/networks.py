"""The sources' networks in plain PyTorch, from their documentation and papers, with their modules' names.

None of our layers are used. A network is built for one output stride; the same weights fit another. Widths
and depths are parameters, so that tests can use small networks; with the defaults, names and shapes are those
of the real files (see `test_packages.py`).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(
    inside: int, outside: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inside, outside, kernel, stride, padding, dilation, groups, bias=False)


DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inside: int, width: int, stride: int, first_dilation: int, dilation: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inside, width, 3, stride, first_dilation), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, 1, dilation), nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (self.downsample(x) if self.downsample else x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inside: int, width: int, stride: int, first_dilation: int, dilation: int) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1, self.bn1 = conv(inside, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride, first_dilation), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, outside, 1), nn.BatchNorm2d(outside)
        self.downsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + (self.downsample(x) if self.downsample else x))


def conv_bn_relu(inside: int, outside: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        conv(inside, outside, kernel, 1, dilation), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    )


class ResNet(nn.Module):
    """Arguments:
    depth: 18 or 34 has basic blocks; style: whose dilation (`torchvision`, `smp`, `mmseg`).
    stem: `conv7`, `timm` or `mmseg`; pooled: ResNet-D's shortcuts (only without dilation).
    classes: of a classifier's `fc`.
    """

    def __init__(
        self,
        depth: int = 50,
        output_stride: int = 32,
        style: str = "torchvision",
        stem: str = "conv7",
        pooled: bool = False,
        width: int = 64,
        depths: Sequence[int] | None = None,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.deep = stem == "mmseg"
        parts = [conv(3, width // 2, 3, 2), nn.BatchNorm2d(width // 2), nn.ReLU()]
        parts += [conv(width // 2, width // 2, 3), nn.BatchNorm2d(width // 2), nn.ReLU()]
        parts += [conv(width // 2, width, 3)]
        if self.deep:
            self.stem = nn.Sequential(*parts, nn.BatchNorm2d(width), nn.ReLU())
        else:
            self.conv1 = conv(3, width, 7, 2) if stem == "conv7" else nn.Sequential(*parts)
            self.bn1 = nn.BatchNorm2d(width)
        block = BasicBlock if depth in (18, 34) else Bottleneck
        inside, total, dilation = width, 4, 1
        for number, count in enumerate(depths or DEPTHS[depth]):
            stride, first = (2 if number else 1), dilation
            if total * stride > output_stride:
                stride, dilation = 1, dilation * 2
                first = dilation if style == "smp" else first
            total *= stride
            stage, blocks = width * 2**number, []
            for index in range(count):
                entry = (stride, first) if index == 0 else (1, dilation)
                second = 1 if style == "mmseg" and block is BasicBlock else dilation
                made = block(inside, stage, *entry, second)
                if index == 0 and (number or inside != stage * block.expansion):
                    made.downsample = _shortcut(inside, stage * block.expansion, stride, pooled)
                blocks.append(made)
                inside = stage * block.expansion
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
        self.channels, self.low_channels = inside, inside // 8
        if classes is not None:
            self.fc = nn.Linear(inside, classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x) if self.deep else F.relu(self.bn1(self.conv1(x)))
        features = [F.max_pool2d(x, 3, 2, 1)]
        for number in (1, 2, 3, 4):
            features.append(self.get_submodule(f"layer{number}")(features[-1]))
        return features[1:]


def _shortcut(inside: int, outside: int, stride: int, pooled: bool) -> nn.Sequential:
    if not pooled:
        return nn.Sequential(conv(inside, outside, 1, stride), nn.BatchNorm2d(outside))
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
    return nn.Sequential(pool, conv(inside, outside, 1), nn.BatchNorm2d(outside))


def conv3x3(inside: int, outside: int, kind: str = "plain", dilation: int = 1) -> nn.Module:
    """Or a separable one, depthwise and 1x1: smp's names are 0 and 1, VainF's body.0 and body.1."""
    if kind == "plain":
        return conv(inside, outside, 3, 1, dilation)
    both = nn.Sequential(conv(inside, inside, 3, 1, dilation, inside), conv(inside, outside, 1))
    return both if kind == "smp" else nn.Sequential(OrderedDict(body=both))


class ImagePool(nn.Sequential):
    """The mean of the image in all its places, by what reads it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *layers)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).expand(-1, -1, *x.shape[2:])


class Aspp(nn.Module):
    """torchvision's ASPP."""

    def __init__(self, inside: int, channels: int, rates: Sequence[int], kind: str = "plain") -> None:
        super().__init__()
        branches: list[nn.Module] = [conv_bn_relu(inside, channels, 1)]
        for rate in rates:
            atrous = conv3x3(inside, channels, kind, rate)
            branches.append(nn.Sequential(atrous, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)))
        self.convs = nn.ModuleList([*branches, ImagePool(*conv_bn_relu(inside, channels, 1))])
        self.project = conv_bn_relu(len(self.convs) * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([branch(x) for branch in self.convs], 1))


def resize(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def rates_at(output_stride: int) -> list[int]:
    return [96 // output_stride * index for index in (1, 2, 3)]


class Head(NamedTuple):
    """Of which kind, trained at which output stride; kind: of its 3x3, see `conv3x3`; skip: channels of the
    low-level features in `deeplabv3plus`."""

    name: str
    stride: int = 8
    kind: str = "plain"
    channels: int = 256
    skip: int = 48
    classes: int = 19


class Network(nn.Module):
    """`grid_logits` of features, then upsampling to the image."""

    align_corners = False

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def backbone_of(self) -> ResNet:
        return self.get_submodule("encoder" if hasattr(self, "encoder") else "backbone")  # type: ignore[return-value]

    def forward(self, images: Tensor) -> Tensor:
        return resize(self.grid_logits(self.backbone_of()(images)), images.shape[2:], self.align_corners)


class Torchvision(Network):
    """`deeplabv3_resnet*` and `fcn_resnet*`, with their auxiliary head."""

    def __init__(self, backbone: ResNet, head: Head) -> None:
        super().__init__()
        self.backbone, inside, channels = backbone, backbone.channels, head.channels
        self.classifier = fcn_head(inside, head.classes)
        if head.name == "deeplabv3":
            aspp, last = Aspp(inside, channels, rates_at(head.stride)), nn.Conv2d(channels, head.classes, 1)
            self.classifier = nn.Sequential(aspp, *conv_bn_relu(channels, channels, 3), last)
        self.aux_classifier = fcn_head(inside // 2, head.classes)

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        return self.classifier(features[3])


def fcn_head(inside: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        *conv_bn_relu(inside, inside // 4, 3), nn.Dropout(0.1), nn.Conv2d(inside // 4, classes, 1)
    )


class VainF(Network):
    """deeplabv3 and deeplabv3plus, and CAD's fcn; the dense 3x3 of networks run finer than trained may be
    dilated."""

    def __init__(self, backbone: ResNet, head: Head) -> None:
        super().__init__()
        inside, channels, own = backbone.channels, head.channels, nn.Module()
        aspp = Aspp(inside, channels, rates_at(head.stride), head.kind)
        last = nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, head.classes, 1)
        if head.name == "fcn":
            own.classifier = fcn_head(inside, head.classes)
        elif head.name == "deeplabv3":
            own.classifier = nn.Sequential(aspp, conv3x3(channels, channels, head.kind), *last)
        else:
            own.project, own.aspp = conv_bn_relu(backbone.low_channels, head.skip, 1), aspp
            own.classifier = nn.Sequential(conv3x3(channels + head.skip, channels, head.kind), *last)
        self.backbone, self.classifier = backbone, own

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        own: Any = self.classifier
        if not hasattr(own, "project"):
            return own.classifier(features[3])
        low = own.project(features[0])
        return own.classifier(torch.cat([low, resize(own.aspp(features[3]), low.shape[2:])], 1))


class Smp(Network):
    """`DeepLabV3` and `DeepLabV3Plus`. For images that its strides do not divide, which smp refuses, the
    upsampling goes to the size of the image."""

    align_corners = True

    def __init__(self, encoder: ResNet, head: Head) -> None:
        super().__init__()
        channels, own = head.channels, nn.Module()

        def separable(inside: int) -> list[nn.Module]:
            return [conv3x3(inside, channels, "smp"), nn.BatchNorm2d(channels), nn.ReLU()]

        aspp = Aspp(encoder.channels, channels, [12, 24, 36], head.kind)  # at any output stride
        if head.name == "deeplabv3":
            own.aspp, own.conv, own.bn = aspp, conv(channels, channels, 3), nn.BatchNorm2d(channels)
        else:
            own.aspp = nn.Sequential(aspp, *separable(channels))
            own.block1 = conv_bn_relu(encoder.low_channels, head.skip, 1)
            own.block2 = nn.Sequential(*separable(channels + head.skip))
        self.encoder, self.decoder = encoder, own
        self.segmentation_head = nn.Sequential(nn.Conv2d(channels, head.classes, 1))

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        own: Any = self.decoder
        grid = own.aspp(features[3])
        if not hasattr(own, "block1"):
            return self.segmentation_head(torch.relu(own.bn(own.conv(grid))))
        low = own.block1(features[0])
        up = resize(grid, low.shape[2:], align_corners=True)
        return self.segmentation_head(own.block2(torch.cat([up, low], 1)))


def conv_module(inside: int, outside: int, kernel: int, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    """mmcv's ConvModule."""
    layers = conv(inside, outside, kernel, 1, dilation, groups), nn.BatchNorm2d(outside), nn.ReLU()
    return nn.Sequential(OrderedDict(zip(("conv", "bn", "activate"), layers, strict=True)))


def separable_module(inside: int, outside: int, dilation: int = 1) -> nn.Sequential:
    """mmcv's DepthwiseSeparableConvModule: norm and ReLU after both parts."""
    depthwise, pointwise = conv_module(inside, inside, 3, dilation, inside), conv_module(inside, outside, 1)
    return nn.Sequential(OrderedDict(depthwise_conv=depthwise, pointwise_conv=pointwise))


class Mmseg(Network):
    """With ASPPHead or, of deeplabv3plus, DepthwiseSeparableASPPHead: image pooling first, a 3x3 over all
    branches."""

    def __init__(self, backbone: ResNet, head: Head) -> None:
        super().__init__()
        inside, channels, plus = backbone.channels, head.channels, head.name == "deeplabv3plus"
        own, auxiliary = nn.Module(), nn.Module()
        own.conv_seg = nn.Conv2d(channels, head.classes, 1)
        own.image_pool = ImagePool(conv_module(inside, channels, 1))
        atrous: Any = separable_module if plus else functools.partial(conv_module, kernel=3)
        branches = [atrous(inside, channels, dilation=rate) for rate in rates_at(head.stride)]
        own.aspp_modules = nn.ModuleList([conv_module(inside, channels, 1), *branches])
        own.bottleneck = conv_module(5 * channels, channels, 3)
        if plus:
            own.c1_bottleneck = conv_module(backbone.low_channels, head.skip, 1)
            own.sep_bottleneck = nn.Sequential(
                separable_module(channels + head.skip, channels), separable_module(channels, channels)
            )
        auxiliary.conv_seg = nn.Conv2d(inside // 8, head.classes, 1)
        auxiliary.convs = nn.Sequential(conv_module(inside // 2, inside // 8, 3))
        self.backbone, self.decode_head, self.auxiliary_head = backbone, own, auxiliary

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        own: Any = self.decode_head
        branches = [own.image_pool(features[3]), *(module(features[3]) for module in own.aspp_modules)]
        out = own.bottleneck(torch.cat(branches, 1))
        if hasattr(own, "c1_bottleneck"):
            low = own.c1_bottleneck(features[0])
            out = own.sep_bottleneck(torch.cat([resize(out, low.shape[2:]), low], 1))
        return own.conv_seg(out)
