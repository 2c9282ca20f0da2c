"""Static forms of residual blocks and of the backbone."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.export.layers import AvgPool, OnGrid, frozen, move_bias, static_conv
from sparse_seg.export.sites import Lattice, Sites, Split
from sparse_seg.models.resnet import STAGE_STRIDES, BasicBlock, ResNet

Reads = tuple[Lattice, Lattice]  # what a block's two selective steps read on the lattice


class Block(nn.Module):
    """A residual block, basic or bottleneck: first the lattice, later the extra sites, from what it read."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.basic = isinstance(block, BasicBlock)
        self.conv1, self.conv2 = static_conv(block.conv1), static_conv(block.conv2)
        if not self.basic:
            self.conv3 = static_conv(block.conv3)
        self.pool = None if block.pool is None else AvgPool(block.pool.spacing)
        self.downsample = None
        if block.downsample is not None:
            self.downsample = static_conv(block.downsample[0])
            move_bias(self.conv2 if self.basic else self.conv3, self.downsample)

    def on_lattice(self, x: Lattice, stride: int) -> tuple[Lattice, Reads]:
        """The output at `stride` and what `on_extras` needs."""
        if self.basic:
            hidden = Lattice(F.relu(self.conv1.on_lattice(x, stride)), stride)
            out = self.conv2.on_lattice(hidden, stride)
        else:
            hidden = Lattice(F.relu(self.conv1.on_lattice(x, x.stride)), x.stride)
            middle = Lattice(F.relu(self.conv2.on_lattice(hidden, stride)), stride)
            out = self.conv3.on_lattice(middle, stride)
        shortcut = x if self.pool is None else Lattice(self.pool.on_lattice(x, stride), stride)
        if self.downsample is None:
            return Lattice(F.relu(out + shortcut.grid), stride), (x, hidden)
        return Lattice(F.relu(out + self.downsample.on_lattice(shortcut, stride)), stride), (x, hidden)

    def on_extras(
        self, reads: Reads, extras: dict[int, Tensor], splits: dict[int, Split], strides: list[int]
    ) -> dict[int, Tensor]:
        """Rows of the extra sites at `strides`, given those that the block before has."""
        x = Sites(reads[0], extras, splits)
        shortcut = self._shortcut(x, strides)
        if self.basic:
            hidden = Sites(reads[1], _relu(self.conv1.on_extras(x, strides)), splits)
            return _relu(self.conv2.on_extras(hidden, strides, shortcut))
        hidden = Sites(
            reads[1], _relu({stride: self.conv1.extra(rows) for stride, rows in extras.items()}), splits
        )
        middle = _relu(self.conv2.on_extras(hidden, strides))
        return _relu({stride: self.conv3.extra(middle[stride], shortcut[stride]) for stride in strides})

    def _shortcut(self, x: Sites, strides: list[int]) -> dict[int, Tensor]:
        if self.pool is None:
            rows = {stride: x.own(stride) for stride in strides}
        else:
            rows = self.pool.on_extras(x, strides)
        if self.downsample is None:
            return rows
        return {stride: self.downsample.extra(rows[stride]) for stride in strides}


def _relu(rows: dict[int, Tensor]) -> dict[int, Tensor]:
    return {stride: F.relu(values) for stride, values in rows.items()}


class Stem(nn.Module):
    """Images in 0..1, RGB, to the grid at stride 4. The standard deviation is part of the first weight."""

    def __init__(self, backbone: ResNet, std: Tensor) -> None:
        super().__init__()
        convs = [module for module in backbone.conv1.modules() if isinstance(module, nn.Conv2d)]
        self.convs, self.strides = nn.ModuleList(), [conv.stride[0] for conv in convs]
        for index, conv in enumerate(convs):
            weight = conv.weight.permute(0, 2, 3, 1)
            self.convs.append(OnGrid(*frozen(weight / std if index == 0 else weight, conv.bias)))

    def forward(self, images: Tensor) -> Lattice:
        for conv, stride in zip(self.convs, self.strides, strict=True):
            images = F.relu(conv(images, stride))
        return Lattice(F.max_pool2d(images, 3, 2, 1), STAGE_STRIDES[0])


class Backbone(nn.Module):
    """Stem and four stages."""

    def __init__(self, backbone: ResNet, std: Tensor) -> None:
        super().__init__()
        self.stem = Stem(backbone, std)
        for number in range(1, 5):
            stage = backbone.get_submodule(f"layer{number}")
            self.add_module(f"layer{number}", nn.ModuleList(map(Block, stage.children())))

    def blocks(self, number: int) -> nn.ModuleList:
        """Those of stage 0 to 3."""
        return self.get_submodule(f"layer{number + 1}")  # type: ignore[return-value]

    def on_lattice(
        self, x: Lattice, stages: range, coarsest: int
    ) -> tuple[Lattice, list[tuple[Block, Reads, int]], list[Lattice]]:
        """Run stages on the lattice, each at its own stride but at most at `coarsest`.

        Returns:
            The output; each block with what it read and its stride; the outputs of the stages.
        """
        blocks: list[tuple[Block, Reads, int]] = []
        outputs = []
        for number in stages:
            stride = min(STAGE_STRIDES[number], coarsest)
            for block in self.blocks(number):
                assert isinstance(block, Block)
                x, reads = block.on_lattice(x, stride)
                blocks.append((block, reads, stride))
            outputs.append(x)
        return x, blocks, outputs


def extra_rows(
    blocks: list[tuple[Block, Reads, int]], splits: dict[int, Split], finest: int
) -> dict[int, Tensor]:
    """Run the extra sites through blocks that have run on the lattice: rows by stride, coarsest first."""
    extras: dict[int, Tensor] = {}
    for block, reads, stride in blocks:
        strides = [own for own in splits if finest <= own < stride]
        extras = block.on_extras(reads, extras, splits, strides)
    return extras


def near_steps(blocks: list[tuple[Block, Reads, int]], stride: int) -> list[int]:
    """How many cells of the grid at twice `stride` lie between taps of those that read ghosts there."""
    steps = set()
    for block, (x, hidden), out in blocks:
        if out <= stride:
            continue
        reading: list[tuple[Any, Lattice]] = [(block.conv2, hidden)]
        if block.basic:
            reading.append((block.conv1, x))
        if block.pool is not None:
            reading.append((block.pool, x))
        steps |= {module.spacing // (2 * stride) for module, read in reading if read.stride > stride}
    return sorted(steps)
