"""ResNet-18/34/50/101 (He et al., CVPR 2016) on rows, from one table.

Every 3x3 convolution is told how far apart its taps lie in pixels. That distance does not depend on the
output stride, so the same modules run at output stride 8, 16 or 32 and on any mix of them: the layout says
which sites exist, the convolutions never learn what "dilation" is. Names follow torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.models.blocks import BasicBlock, Bottleneck, Stage
from sparse_seg.models.forms import grid_macs
from sparse_seg.sparse import SiteLayout, Step, grid_to_rows

STAGE_STRIDES = (4, 8, 16, 32)  # natural strides of layer1..layer4, in pixels


@dataclass(frozen=True)
class Architecture:
    """A row of the table: a residual block, how many of them a stage has, and how wide they are."""

    block: Any  # a subclass of Residual with the arguments of BasicBlock
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)


RESNET18 = Architecture(BasicBlock, (2, 2, 2, 2))
RESNET34 = Architecture(BasicBlock, (3, 4, 6, 3))
RESNET50 = Architecture(Bottleneck, (3, 4, 6, 3))
RESNET101 = Architecture(Bottleneck, (3, 4, 23, 3))


class StageInfo(NamedTuple):
    """Description of a backbone's stage: its name, output channels, natural stride in px, and its module."""

    name: str
    channels: int
    stride: int
    module: Stage


class ResNet(nn.Module):
    """Stem and four stages.

    Args:
        architecture: what the stages are made of.
        width: multiplier of all widths; each must come out whole.
        exchange: exchange rule of all 3x3 convolutions.
        engine: what runs them, see `SelectiveConv2d`.
        stem: `conv7`, one 7x7 convolution, or `deep`, three 3x3 (ResNet-C and -D; He et al., CVPR 2019).
        shortcut: `conv`, a strided 1x1, or `avg_pool`, a 2x2 mean and a 1x1 (ResNet-D).
        entry_spacings: px between taps of the first 3x3 convolution of layer2..layer4: where the network's
            dense form strides, the spacing of the stage before.
        dilate_second: whether the second 3x3 of layer3's and layer4's basic blocks has the stage's spacing;
            if not, its taps are one cell of the finest grid apart (mmsegmentation's).
        depths: blocks of each stage; overrides the architecture.
        options: further arguments of the architecture's block.

    Raises:
        ValueError: a width that makes a fraction of a channel.
    """

    conv1: Any  # nn.Conv2d, or nn.Sequential for a deep stem

    def __init__(
        self,
        architecture: Architecture,
        width: float = 1.0,
        exchange: str = "linear",
        engine: str = "auto",
        stem: str = "conv7",
        shortcut: str = "conv",
        entry_spacings: Sequence[int] = STAGE_STRIDES[:3],
        dilate_second: bool = True,
        depths: Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        widths = [whole_channels(base, width) for base in architecture.widths]
        self.conv1 = _deep_stem(widths[0]) if stem == "deep" else _conv(3, widths[0], 7, stride=2)
        self.bn1: nn.Module = nn.BatchNorm2d(widths[0])

        block, channels = architecture.block, widths[0]
        entries = (STAGE_STRIDES[0], *entry_spacings)
        self.stage_channels = [stage_width * block.expansion for stage_width in widths]
        for number, depth in enumerate(depths or architecture.depths):
            blocks, natural = list[nn.Module](), STAGE_STRIDES[number]
            spacing = natural if dilate_second or number < 2 else None
            for index in range(depth):
                first, out_channels = index == 0, self.stage_channels[number]
                strides = first and number > 0
                pool = STAGE_STRIDES[number - 1] if strides and shortcut == "avg_pool" else None
                projects = strides or channels != out_channels
                entry = entries[number] if first else natural
                blocks.append(
                    block(
                        channels, widths[number], entry, spacing, exchange, engine, projects, pool, **options
                    )
                )
                channels = out_channels
            self.add_module(f"layer{number + 1}", Stage(blocks))

    @property
    def stages(self) -> list[StageInfo]:
        """The stages in order."""
        names = [f"layer{number}" for number in range(1, len(STAGE_STRIDES) + 1)]
        modules: list[Any] = [self.get_submodule(name) for name in names]
        rows = zip(names, self.stage_channels, STAGE_STRIDES, modules, strict=True)
        return [StageInfo(*row) for row in rows]

    def stem(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` to rows at stride 4, `[B * ceil(H/4) * ceil(W/4), C]`."""
        out = self.bn1(self.conv1(images.contiguous(memory_format=torch.channels_last)))
        pooled = F.max_pool2d(out, 3, stride=2, padding=1)
        return grid_to_rows(F.relu(pooled, inplace=True))  # after pooling it has less to do: the same values

    def forward(self, images: Tensor, sites: Sequence[SiteLayout | Step]) -> list[Tensor]:
        """Images `[B, 3, H, W]` to the rows of the stages, each run on its sites of those given."""
        return self.run_stages(self.stem(images), sites)

    def run_stages(
        self,
        rows: Tensor,
        sites: Sequence[SiteLayout | Step],
        first: int = 0,
        src: SiteLayout | Step | None = None,
    ) -> list[Tensor]:
        """The rows of the stages from index `first` on, each run on its sites of those given.

        Args:
            rows: what the first of them reads, on `src` (the stem's rows are on layer1's sites, the default).
        """
        steps, outputs = Step.of_all(sites), []
        src = steps[0] if src is None else Step.of(src)
        for stage, dst in zip(self.stages[first:], steps, strict=False):
            rows, src = stage.module(rows, src, dst), dst
            outputs.append(rows)
        return outputs

    def norm_pairs(self) -> list[tuple[str, str]]:
        last = f".{len(self.conv1) - 1}" if isinstance(self.conv1, nn.Sequential) else ""
        return [(f"conv1{last}", "bn1")]

    def stem_macs(self, size: tuple[int, int], batch: int) -> int:
        """Multiply-adds of the stem on images of `size` (H, W): all its convolutions run at stride 2."""
        return grid_macs(self.conv1, batch * -(-size[0] // 2) * -(-size[1] // 2))


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
