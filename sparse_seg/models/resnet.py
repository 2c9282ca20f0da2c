"""ResNet-18/34/50/101 (He et al., CVPR 2016) on rows, from one stage table.

Every 3x3 convolution is told how far apart its taps lie in pixels. That distance does not depend on the
output stride, so the same modules run at output stride 8, 16 or 32 and on any mix of them: the layout says
which sites exist, the convolutions never learn what "dilation" is. Names follow torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.sparse import SelectiveAvgPool2d, SelectiveConv2d, SiteLayout, grid_to_rows, select_rows

STAGE_STRIDES = (4, 8, 16, 32)  # natural strides of layer1..layer4, in pixels
STAGE_WIDTHS = (64, 128, 256, 512)
STEMS = ("conv7", "deep")  # one 7x7 convolution, or three 3x3 (ResNet-C and -D; He et al., CVPR 2019)
SHORTCUTS = ("conv", "avg_pool")  # strided 1x1, or a 2x2 mean and a 1x1 (ResNet-D)


def first_selective_stage(finest_stride: int) -> int:
    """Index of the first stage whose stride a mask decides, down to `finest_stride` px."""
    return sum(stride <= finest_stride for stride in STAGE_STRIDES)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. The second always has the stage's natural spacing (docs/method.md, on P1).

    Args:
        channels, width: of the input and of the 3x3 convolutions.
        entry, spacing: px between taps of the first and of the second convolution.
        exchange, engine: see `SelectiveConv2d`.
        projects: whether the shortcut has a 1x1 convolution.
        pool: px of the window step of the shortcut's 2x2 mean before it; None: no mean, sites are picked.
    """

    expansion = 1

    def __init__(
        self,
        channels: int,
        width: int,
        entry: int,
        spacing: int,
        exchange: str,
        engine: str,
        projects: bool,
        pool: int | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = SelectiveConv2d(channels, width, entry, exchange, engine)
        self.bn1 = nn.BatchNorm1d(width)
        self.conv2 = SelectiveConv2d(width, width, spacing, exchange, engine)
        self.bn2 = nn.BatchNorm1d(width)
        self.downsample = _downsample(channels, width) if projects else None
        self.pool = None if pool is None else SelectiveAvgPool2d(pool, exchange)

    def forward(self, rows: Tensor, src: SiteLayout, dst: SiteLayout) -> Tensor:
        """Rows `[src.num_sites, channels]` to `[dst.num_sites, width]`."""
        out = F.relu(self.bn1(self.conv1(rows, src, dst)), inplace=True)
        out = self.bn2(self.conv2(out, dst, dst))
        shortcut = self.pool(rows, src, dst) if self.pool else select_rows(rows, src, dst, self)
        out += self.downsample(shortcut) if self.downsample else shortcut
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; the 3x3 is the one that strides (torchvision's variant). Arguments as `BasicBlock`'s."""

    expansion = 4

    def __init__(
        self,
        channels: int,
        width: int,
        entry: int,
        spacing: int,
        exchange: str,
        engine: str,
        projects: bool,
        pool: int | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Linear(channels, width, bias=False)
        self.bn1 = nn.BatchNorm1d(width)
        self.conv2 = SelectiveConv2d(width, width, entry, exchange, engine)
        self.bn2 = nn.BatchNorm1d(width)
        self.conv3 = nn.Linear(width, width * self.expansion, bias=False)
        self.bn3 = nn.BatchNorm1d(width * self.expansion)
        self.downsample = _downsample(channels, width * self.expansion) if projects else None
        self.pool = None if pool is None else SelectiveAvgPool2d(pool, exchange)

    def forward(self, rows: Tensor, src: SiteLayout, dst: SiteLayout) -> Tensor:
        """Rows `[src.num_sites, channels]` to `[dst.num_sites, 4 * width]`."""
        out = F.relu(self.bn1(self.conv1(rows)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out, src, dst)), inplace=True)
        out = self.bn3(self.conv3(out))
        shortcut = self.pool(rows, src, dst) if self.pool else select_rows(rows, src, dst, self)
        out += self.downsample(shortcut) if self.downsample else shortcut
        return F.relu(out, inplace=True)


def _downsample(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, out_channels, bias=False), nn.BatchNorm1d(out_channels))


ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class Stage(nn.ModuleList):
    """A stage's blocks. Only the first may change the layout; all others read and write the same."""

    def forward(self, rows: Tensor, src: SiteLayout, dst: SiteLayout) -> Tensor:
        for block in self:
            rows, src = block(rows, src, dst), dst
        return rows


class ResNet(nn.Module):
    """Stem and four stages.

    Args:
        name: `resnet18`, `resnet34`, `resnet50` or `resnet101`.
        width: multiplier of all widths; each must come out whole.
        exchange: exchange rule of all 3x3 convolutions.
        engine: what runs them, see `SelectiveConv2d`.
        stem, shortcut: one of `STEMS`, `SHORTCUTS`.
        entry_spacings: px between taps of the first 3x3 convolution of layer2..layer4: where the network's
            dense form strides, the spacing of the stage before.
        dilate_second: whether the second 3x3 of layer3's and layer4's basic blocks has the stage's spacing;
            if not, its taps are one cell of the finest grid apart (mmsegmentation's).
        depths: blocks of each stage, in place of those that the name stands for.

    Raises:
        ValueError: unknown name, or a width that makes a fraction of a channel.
    """

    conv1: Any  # nn.Conv2d, or nn.Sequential for a deep stem

    def __init__(
        self,
        name: str,
        width: float = 1.0,
        exchange: str = "linear",
        engine: str = "auto",
        stem: str = "conv7",
        shortcut: str = "conv",
        entry_spacings: Sequence[int] = STAGE_STRIDES[:3],
        dilate_second: bool = True,
        depths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if name not in ARCHITECTURES:
            raise ValueError(f"unknown backbone {name!r}; choose one of {', '.join(ARCHITECTURES)}")
        block, named_depths = ARCHITECTURES[name]
        widths = [whole_channels(base, width) for base in STAGE_WIDTHS]
        self.conv1 = _deep_stem(widths[0]) if stem == "deep" else _conv(3, widths[0], 7, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[0])

        channels, stages = widths[0], []
        entries = (STAGE_STRIDES[0], *entry_spacings)
        for number, depth in enumerate(depths or named_depths):
            spacing, blocks = STAGE_STRIDES[number], []
            for index in range(depth):
                first, out_channels = index == 0, widths[number] * block.expansion
                strides = first and number > 0
                pool = STAGE_STRIDES[number - 1] if strides and shortcut == "avg_pool" else None
                projects = strides or channels != out_channels
                entry = entries[number] if first else spacing
                blocks.append(
                    block(channels, widths[number], entry, spacing, exchange, engine, projects, pool)
                )
                channels = out_channels
            stages.append(Stage(blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.stage_channels = [stage_width * block.expansion for stage_width in widths]
        for basic in (*self.layer3, *self.layer4):
            if isinstance(basic, BasicBlock) and not dilate_second:
                basic.conv2.spacing = None

    def stem(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to rows at stride 4, `[B * ceil(H/4) * ceil(W/4), C]`."""
        out = self.conv1(images.contiguous(memory_format=torch.channels_last))
        out = F.max_pool2d(F.relu(self.bn1(out), inplace=True), 3, stride=2, padding=1)
        return grid_to_rows(out)

    def forward(self, images: Tensor, layouts: Sequence[SiteLayout]) -> list[Tensor]:
        """Images `[B, 3, H, W]` to the rows of layer1..layer4, each run on its layout of the four given."""
        return self.run_stages(self.stem(images), layouts)

    def run_stages(self, rows: Tensor, layouts: Sequence[SiteLayout], first: int = 0) -> list[Tensor]:
        """The rows of the stages from index `first` on, as many as there are layouts.

        rows: what the first of them reads, on the layout before its own (the stem's is that of layer1).
        """
        src, outputs = layouts[max(first - 1, 0)], []
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        for stage, dst in zip(stages[first : len(layouts)], layouts[first:], strict=True):
            rows, src = stage(rows, src, dst), dst
            outputs.append(rows)
        return outputs


def _conv(channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _deep_stem(width: int) -> nn.Sequential:
    """Three 3x3 convolutions, the first of stride 2; the last one's norm is the ResNet's `bn1` (timm)."""
    half = whole_channels(width, 0.5)
    return nn.Sequential(
        _conv(3, half, 3, stride=2), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        _conv(half, half, 3), nn.BatchNorm2d(half), nn.ReLU(inplace=True),
        _conv(half, width, 3),
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
