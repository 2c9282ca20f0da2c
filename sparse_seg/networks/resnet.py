"""ResNet-18/34/50/101 (He et al., CVPR 2016) and their C and D variants (He et al., CVPR 2019), dilated.

Names follow torchvision's and timm's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from sparse_seg.ops.pooling import dilated_mean

STRIDES = (4, 8, 16, 32)  # natural strides of layer1..layer4, px
WIDTHS = (64, 128, 256, 512)  # of their 3x3 convolutions


class ResNet(nn.Module):
    """Stem and four stages.

    Args:
        block: `BasicBlock`, `Bottleneck`, or one with their arguments.
        depths: blocks of each stage.
        width: multiplier of all channels; they must come out whole.
        output_stride: of the last stage, px: stages beyond it dilate in place of striding.
        stem: `conv7`, one 7x7 convolution, or `deep`, three 3x3 (ResNet-C and -D).
        shortcut: `conv`, a strided 1x1, or `avg_pool`, a 2x2 mean and a 1x1 (ResNet-D).
        entry_spacings: px between taps of the first 3x3 convolution of layer2..layer4: where the network's
            dense form strides, the stride of the stage before.
        dilate_second: whether the second 3x3 of layer3's and layer4's basic blocks is dilated; mmsegmentation
            leaves it undilated.

    Attributes:
        stages: names of the modules that give the features, and their natural strides in px.
        channels: of the features.

    Raises:
        ValueError: a width that makes a fraction of a channel.
    """

    stages: ClassVar[dict[str, int]] = {f"layer{n}": stride for n, stride in enumerate(STRIDES, 1)}

    def __init__(
        self,
        block: Any,
        depths: Sequence[int] = (2, 2, 2, 2),
        width: float = 1.0,
        output_stride: int = 32,
        stem: str = "conv7",
        shortcut: str = "conv",
        entry_spacings: Sequence[int] = STRIDES[:3],
        dilate_second: bool = True,
    ) -> None:
        super().__init__()
        sizes = [whole_channels(base, width) for base in WIDTHS]
        self.conv1 = _deep_stem(sizes[0]) if stem == "deep" else conv(3, sizes[0], 7, stride=2)
        self.bn1 = nn.BatchNorm2d(sizes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.channels = [size * block.expansion for size in sizes]
        channels, before = sizes[0], STRIDES[0]
        for number, (name, depth, natural) in enumerate(zip(self.stages, depths, STRIDES, strict=True)):
            at, blocks = min(natural, output_stride), list[nn.Module]()
            second = natural // at if dilate_second or number < 2 else 1
            for index in range(depth):
                entry, spacing = (
                    (before, (STRIDES[0], *entry_spacings)[number]) if index == 0 else (at, natural)
                )
                down = None
                if index == 0 and (number > 0 or channels != self.channels[number]):
                    pool = STRIDES[number - 1] // before if number and shortcut == "avg_pool" else 0
                    down = downsample(channels, self.channels[number], at // before, pool)
                blocks.append(block(channels, sizes[number], at // entry, spacing // entry, second, down))
                channels = self.channels[number]
            self.add_module(name, nn.Sequential(*blocks))
            before = at

    def forward(self, images: Tensor) -> list[Tensor]:
        """`[B, 3, H, W]` to the stages' features `[B, C, h, w]`."""
        grid, features = self.maxpool(self.relu(self.bn1(self.conv1(images)))), []
        for name in self.stages:
            grid = self.get_submodule(name)(grid)
            features.append(grid)
        return features


class BasicBlock(nn.Module):
    """Two 3x3 convolutions.

    Args:
        channels, width: of the input and of the 3x3 convolutions.
        stride, dilation: of the first, which alone strides; second: dilation of the second.
        downsample: of the shortcut; None: the input itself.
    """

    expansion = 1  # channels of the output over `width`

    def __init__(
        self, channels: int, width: int, stride: int, dilation: int, second: int, downsample: Any
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 3, stride, dilation), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(width, width, 3, 1, second), nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, grid: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(grid)))
        out = self.bn2(self.conv2(out))
        out += grid if self.downsample is None else self.downsample(grid)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; the 3x3 is the one that strides (torchvision's variant). Arguments as `BasicBlock`'s."""

    expansion = 4

    def __init__(
        self, channels: int, width: int, stride: int, dilation: int, second: int, downsample: Any
    ) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride, dilation), nn.BatchNorm2d(width)
        outside = width * self.expansion
        self.conv3, self.bn3 = conv(width, outside, 1), nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, grid: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(grid)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += grid if self.downsample is None else self.downsample(grid)
        return self.relu(out)


resnet18 = functools.partial(ResNet, BasicBlock, depths=(2, 2, 2, 2))
resnet34 = functools.partial(ResNet, BasicBlock, depths=(3, 4, 6, 3))
resnet50 = functools.partial(ResNet, Bottleneck, depths=(3, 4, 6, 3))
resnet101 = functools.partial(ResNet, Bottleneck, depths=(3, 4, 23, 3))


class DilatedMean(nn.Module):
    """Mean of a place and those `dilation` cells right, below, and diagonal, as far as they are inside."""

    def __init__(self, stride: int, dilation: int) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation

    def forward(self, grid: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C, ceil(H/stride), ceil(W/stride)]`."""
        return dilated_mean(grid, self.stride, self.dilation)


def downsample(channels: int, outside: int, stride: int, pool: int = 0) -> nn.Sequential:
    """A shortcut's 1x1 and norm, after a mean of `pool` cells' dilation where that is not 0."""
    if not pool:
        return nn.Sequential(conv(channels, outside, 1, stride), nn.BatchNorm2d(outside))
    return nn.Sequential(DilatedMean(stride, pool), conv(channels, outside, 1), nn.BatchNorm2d(outside))


def conv(inside: int, outside: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Without bias, padded to keep its size; 3x3 and larger with He initialisation over the outputs."""
    made = nn.Conv2d(inside, outside, kernel, stride, kernel // 2 * dilation, dilation, bias=False)
    if kernel > 1:
        nn.init.normal_(made.weight, std=math.sqrt(2 / (kernel**2 * outside)))
    return made


def _deep_stem(width: int) -> nn.Sequential:
    """Three 3x3 convolutions, the first of stride 2; the last one's norm is the ResNet's `bn1` (timm)."""
    half = whole_channels(width, 0.5)
    return nn.Sequential(
        conv(3, half, 3, stride=2), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        conv(half, half, 3), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        conv(half, width, 3),
    )  # fmt: skip


def whole_channels(base: int, width: float) -> int:
    """`base * width` as a whole number of channels.

    Raises:
        ValueError: it is not whole or not positive.
    """
    channels = base * width
    if channels != round(channels) or channels < 1:
        raise ValueError(
            f"width {width} makes {channels} of {base} channels; choose one that makes whole ones"
        )
    return round(channels)
