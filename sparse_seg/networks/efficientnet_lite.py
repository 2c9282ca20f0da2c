"""EfficientNet-Lite0, 1 and 2 (Tan and Le, ICML 2019; TensorFlow's TPU models), dilated; timm's names.

TensorFlow's SAME padding puts one place less before a strided window than behind it where lengths are even.
Here it does so at every length: taps keep their distance from the place that they write, at any size and
output stride.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-3  # of the norms, TensorFlow's
# kernel, stride, expansion, channels, blocks
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM = 32


class EfficientNetLite(nn.Module):
    """Stem and seven stages, without the classifier's layers.

    Args:
        wider, deeper: multipliers of channels and blocks.
        output_stride: of the last stage, px: stages beyond it dilate in place of striding.

    Attributes:
        stages: names of the modules that give the features, and their natural strides in px.
        channels: of the features.
    """

    stages: ClassVar[dict[str, int]] = {"blocks.1": 4, "blocks.2": 8, "blocks.4": 16, "blocks.6": 32}

    def __init__(self, wider: float = 1.0, deeper: float = 1.0, output_stride: int = 32) -> None:
        super().__init__()
        self.conv_stem = Conv2dSame(3, STEM, 3, 2)
        self.bn1, self.act = nn.BatchNorm2d(STEM, EPS), nn.ReLU6(inplace=True)
        stages, channels, natural, at = list[nn.Module](), STEM, 2, 2
        for number, (kernel, stride, expansion, base, count) in enumerate(STAGES):
            ends = number in (0, len(STAGES) - 1)  # their depth stays
            outside, blocks = _rounded(base * wider), list[nn.Module]()
            for index in range(count if ends else -(-int(count * deeper * 1000) // 1000)):
                step = stride if index == 0 else 1
                before, natural = natural, natural * step
                apart, now = before // at, min(natural, output_stride)
                conv = Conv2dSame(
                    channels * expansion, channels * expansion, kernel, now // at, apart, step, groups=True
                )
                blocks.append(InvertedResidual(channels, outside, expansion, conv))
                channels, at = outside, now
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        numbers = [int(name.rpartition(".")[2]) for name in self.stages]
        self.channels = [_rounded(STAGES[number][3] * wider) for number in numbers]

    def forward(self, images: Tensor) -> list[Tensor]:
        """`[B, 3, H, W]` to the features `[B, C, h, w]`."""
        grid, features = self.act(self.bn1(self.conv_stem(images))), []
        for number, stage in enumerate(self.blocks):
            grid = stage(grid)
            if f"blocks.{number}" in self.stages:
                features.append(grid)
        return features


class InvertedResidual(nn.Module):
    """1x1 up (where it expands), depthwise, 1x1 down; the input added where it has the same form."""

    def __init__(self, inside: int, outside: int, expansion: int, depthwise: Conv2dSame) -> None:
        super().__init__()
        width, self.act = inside * expansion, nn.ReLU6(inplace=True)
        up = {"conv_pw": nn.Conv2d(inside, width, 1, bias=False)} if expansion > 1 else {}
        down = {"conv_pwl" if up else "conv_pw": nn.Conv2d(width, outside, 1, bias=False)}
        self.layers = list[tuple[str, str]]()  # names of convolutions and their norms
        for number, (name, conv) in enumerate({**up, "conv_dw": depthwise, **down}.items(), 1):
            self.add_module(name, conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(conv.out_channels, EPS))
            self.layers.append((name, f"bn{number}"))
        self.adds = inside == outside and depthwise.natural == 1

    def forward(self, grid: Tensor) -> Tensor:
        out = grid
        for name, norm in self.layers:
            out = self.get_submodule(norm)(self.get_submodule(name)(out))
            out = out if name == self.layers[-1][0] else self.act(out)
        return out + grid if self.adds else out


class Conv2dSame(nn.Conv2d):
    """Without bias, padded to as many places as its stride leaves.

    Args:
        natural: its stride in the network without dilation, by which TensorFlow places its taps; default:
            its stride.
    """

    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        natural: int | None = None,
        groups: bool = False,
    ) -> None:
        super().__init__(inside, outside, kernel, stride, 0, dilation, inside if groups else 1, bias=False)
        self.natural = stride if natural is None else natural
        before = (kernel - self.natural) // 2 * dilation
        after = (kernel - 1) * dilation - before
        self.pads = (before, after, before, after)

    def forward(self, grid: Tensor) -> Tensor:
        before, after = self.pads[:2]
        if before == after:
            return F.conv2d(grid, self.weight, None, self.stride, before, self.dilation, self.groups)
        padded = F.pad(grid, self.pads)
        return F.conv2d(padded, self.weight, None, self.stride, 0, self.dilation, self.groups)


def _rounded(channels: float) -> int:
    """To multiples of 8, and not by more than a tenth down."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


efficientnet_lite0 = functools.partial(EfficientNetLite, 1.0, 1.0)
efficientnet_lite1 = functools.partial(EfficientNetLite, 1.0, 1.1)
efficientnet_lite2 = functools.partial(EfficientNetLite, 1.1, 1.2)
