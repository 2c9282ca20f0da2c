"""The sources' networks in plain PyTorch, from their documentation and papers, with their modules' names.

None of our layers are used. A network is built for one output stride; the same weights fit another. Widths
and depths are parameters, so that tests can use small networks; with the defaults, names and shapes are those
of the real files (see `test_networks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import DEPTHS, DenseBasicBlock, DenseBottleneck


def conv(
    inside: int, outside: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inside, outside, kernel, stride, padding, dilation, groups, bias=False)


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
        block = DenseBasicBlock if depth in (18, 34) else DenseBottleneck
        inside, total, dilation = width, 4, 1
        for number, count in enumerate(depths or DEPTHS[f"resnet{depth}"]):
            stride, first = (2 if number else 1), dilation
            if total * stride > output_stride:
                stride, dilation = 1, dilation * 2
                first = dilation if style == "smp" else first
            total *= stride
            stage, blocks = width * 2**number, []
            for index in range(count):
                entry = (stride, first) if index == 0 else (1, dilation)
                second = 1 if style == "mmseg" and block is DenseBasicBlock else dilation
                made = block(inside, stage, *entry, second, down=False)
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


class Separable(nn.Sequential):
    """Depthwise and 1x1 (smp's names: 0, 1)."""

    def __init__(self, inside: int, outside: int, dilation: int = 1) -> None:
        super().__init__(conv(inside, inside, 3, 1, dilation, inside), conv(inside, outside, 1))


class BodySeparable(nn.Module):
    """The same by VainF's names: body.0, body.1."""

    def __init__(self, inside: int, outside: int, dilation: int = 1) -> None:
        super().__init__()
        self.body = Separable(inside, outside, dilation)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def conv3x3(inside: int, outside: int, kind: str = "plain", dilation: int = 1) -> nn.Module:
    if kind == "plain":
        return conv(inside, outside, 3, 1, dilation)
    return (Separable if kind == "smp" else BodySeparable)(inside, outside, dilation)


class ImagePool(nn.Sequential):
    def __init__(self, inside: int, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(inside, channels, 1))

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
        self.convs = nn.ModuleList([*branches, ImagePool(inside, channels)])
        self.project = conv_bn_relu(len(self.convs) * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([branch(x) for branch in self.convs], 1))


def resize(x: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def shape(x: Tensor) -> tuple[int, int]:
    return x.shape[2], x.shape[3]


def rates_at(output_stride: int) -> list[int]:
    return [96 // output_stride * index for index in (1, 2, 3)]


class Network(nn.Module):
    """`grid_logits` of features, then upsampling to the image."""

    align_corners = False
    features: ResNet

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def backbone_of(self) -> ResNet:
        return self.get_submodule("encoder" if hasattr(self, "encoder") else "backbone")  # type: ignore[return-value]

    def forward(self, images: Tensor) -> Tensor:
        return resize(self.grid_logits(self.backbone_of()(images)), shape(images), self.align_corners)


class Torchvision(Network):
    """`deeplabv3_resnet*` and `fcn_resnet*`, with their auxiliary head."""

    def __init__(
        self, head: str, backbone: ResNet, output_stride: int, channels: int = 256, classes: int = 21
    ) -> None:
        super().__init__()
        self.backbone = backbone
        inside = backbone.channels
        self.classifier: nn.Module = fcn_head(inside, classes)
        if head == "deeplabv3":
            aspp = Aspp(inside, channels, rates_at(output_stride))
            last = nn.Conv2d(channels, classes, 1)
            self.classifier = nn.Sequential(aspp, *conv_bn_relu(channels, channels, 3), last)
        self.aux_classifier = fcn_head(inside // 2, classes)

    def grid_logits(self, features: list[Tensor]) -> Tensor:
        return self.classifier(features[3])


def fcn_head(inside: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        *conv_bn_relu(inside, inside // 4, 3), nn.Dropout(0.1), nn.Conv2d(inside // 4, classes, 1)
    )
