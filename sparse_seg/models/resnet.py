"""ResNet-18/34/50/101 (He et al., CVPR 2016) on rows, from one stage table.

Every 3x3 convolution is told how far apart its taps lie in pixels. That distance does not depend on the
output stride, so the same modules run at output stride 8, 16 or 32 and on any mix of them: the layout says
which sites exist, the convolutions never learn what "dilation" is. Names follow torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.sparse import SelectiveConv2d, SiteLayout, grid_to_rows, select_rows

STAGE_STRIDES = (4, 8, 16, 32)  # natural strides of layer1..layer4, in pixels
STAGE_WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. The second always has the stage's natural spacing (design.md, section 2)."""

    expansion = 1

    def __init__(
        self, channels: int, width: int, entry: int, spacing: int, exchange: str, engine: str
    ) -> None:
        super().__init__()
        self.conv1 = SelectiveConv2d(channels, width, entry, exchange, engine)
        self.bn1 = nn.BatchNorm1d(width)
        self.conv2 = SelectiveConv2d(width, width, spacing, exchange, engine)
        self.bn2 = nn.BatchNorm1d(width)
        self.downsample = _downsample(channels, width, entry != spacing)

    def forward(self, rows: Tensor, src: SiteLayout, dst: SiteLayout) -> Tensor:
        """Rows `[src.num_sites, channels]` to `[dst.num_sites, width]`."""
        out = F.relu(self.bn1(self.conv1(rows, src, dst)), inplace=True)
        out = self.bn2(self.conv2(out, dst, dst))
        shortcut = select_rows(rows, src, dst, self)
        out += self.downsample(shortcut) if self.downsample else shortcut
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; the 3x3 is the one that strides (torchvision's variant)."""

    expansion = 4

    def __init__(
        self, channels: int, width: int, entry: int, spacing: int, exchange: str, engine: str
    ) -> None:
        super().__init__()
        self.conv1 = nn.Linear(channels, width, bias=False)
        self.bn1 = nn.BatchNorm1d(width)
        self.conv2 = SelectiveConv2d(width, width, entry, exchange, engine)
        self.bn2 = nn.BatchNorm1d(width)
        self.conv3 = nn.Linear(width, width * self.expansion, bias=False)
        self.bn3 = nn.BatchNorm1d(width * self.expansion)
        self.downsample = _downsample(channels, width * self.expansion, entry != spacing)

    def forward(self, rows: Tensor, src: SiteLayout, dst: SiteLayout) -> Tensor:
        """Rows `[src.num_sites, channels]` to `[dst.num_sites, 4 * width]`."""
        out = F.relu(self.bn1(self.conv1(rows)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out, src, dst)), inplace=True)
        out = self.bn3(self.conv3(out))
        shortcut = select_rows(rows, src, dst, self)
        out += self.downsample(shortcut) if self.downsample else shortcut
        return F.relu(out, inplace=True)


def _downsample(channels: int, out_channels: int, strides: bool) -> nn.Sequential | None:
    if channels == out_channels and not strides:
        return None
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

    Raises:
        ValueError: unknown name, or a width that makes a fraction of a channel.
    """

    def __init__(self, name: str, width: float = 1.0, exchange: str = "linear", engine: str = "auto") -> None:
        super().__init__()
        if name not in ARCHITECTURES:
            raise ValueError(f"unknown backbone {name!r}; choose one of {', '.join(ARCHITECTURES)}")
        block, depths = ARCHITECTURES[name]
        widths = [whole_channels(base, width) for base in STAGE_WIDTHS]
        self.conv1 = nn.Conv2d(3, widths[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

        channels, entry, stages = widths[0], STAGE_STRIDES[0], []
        for stage_width, depth, spacing in zip(widths, depths, STAGE_STRIDES, strict=True):
            blocks = []
            for _ in range(depth):
                blocks.append(block(channels, stage_width, entry, spacing, exchange, engine))
                channels, entry = stage_width * block.expansion, spacing
            stages.append(Stage(blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.stage_channels = [stage_width * block.expansion for stage_width in widths]

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
