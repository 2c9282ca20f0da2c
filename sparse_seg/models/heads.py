"""Heads: rows of the last stage to logits. What is 1x1 or evenly spaced runs on rows, before densify."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparse_seg.models.aspp import linear_norm_relu
from sparse_seg.models.forms import grid_macs, plain, rebuilt, row_macs
from sparse_seg.models.patch import decode_split_cells, enlarged, layers, reads_neighbours
from sparse_seg.sparse import SiteLayout, Step, dense_levels, densify, double, with_cells

FINEST_DENSE_STRIDE = 8  # of dense networks, in px
LOW_LEVEL_STRIDE = 4  # of layer1, whose grid `deeplabv3plus` reads and writes


@dataclass(frozen=True)
class HeadOptions:
    """Settings of all heads; each head uses its own.

    Args:
        in_channels: of layer4's rows; low_level_in_channels: of layer1's.
        num_classes: K.
        channels: of the head; None for its own default.
        spacings: of ASPP's 3x3 branches, px.
        exchange, engine: of 3x3 convolutions on rows, see `SelectiveConv2d`.
        trained_stride: output stride that the head was trained at, px.
        aspp_separable, separable: of ASPP's branches and of the dense 3x3 convolutions, see `ASPP`.
        refine_separable: of the dense 3x3 after ASPP; None: as `separable`.
        aspp_projection: see `ASPP`.
        refine: whether a dense 3x3 follows ASPP.
        low_level_channels: of the low-level skip after its 1x1 projection.
        decoder_convs: 3x3 convolutions after the skip.
        align_corners: of the upsampling to the skip's grid.
    """

    in_channels: int
    num_classes: int
    spacings: Sequence[int] = ()
    low_level_in_channels: int = 0
    channels: int | None = None
    exchange: str = "linear"
    engine: str = "auto"
    trained_stride: int = 8
    aspp_separable: str = "none"
    separable: str = "none"
    refine_separable: str | None = None
    aspp_projection: bool = True
    refine: bool = True
    low_level_channels: int = 48
    decoder_convs: int = 1
    align_corners: bool = False


def at_dense_spacing(module: nn.Module, grid: Tensor, stride: int) -> Tensor:
    """Run dense 3x3 convolutions on a grid `[B, C, H, W]`; on one finer than stride 8 with stride 8's taps.

    Dense networks have them one cell apart, at 8 px or more. On a finer grid that is several cells: cells of
    other phases are other grids.
    """
    phases = FINEST_DENSE_STRIDE // stride
    if phases <= 1:
        return module(grid)
    parts = [(slice(y, None, phases), slice(x, None, phases)) for y in range(phases) for x in range(phases)]
    first, *others = (module(grid[:, :, y, x]) for y, x in parts)
    out = grid.new_empty(grid.shape[0], first.shape[1], *grid.shape[2:])
    for (y, x), part in zip(parts, (first, *others), strict=True):
        out[:, :, y, x] = part
    return out


class Head(nn.Module):
    """A head in two parts: `neck` on rows, `decode` on the grid that densify makes of them.

    A subclass says which of its children the neck runs, and has its forms from here.
    """

    refine: nn.Module
    classifier: nn.Conv2d
    NECK: ClassVar[tuple[str, ...]] = ()  # names of the children that run on rows
    reads_low_level: ClassVar[bool] = False  # whether `decode` reads layer1's grid and writes its stride

    def forward(self, rows: Tensor, sites: SiteLayout | Step, low_level: Tensor | None = None) -> Tensor:
        """Rows `[sites.num_run, in_channels]` to logits `[B, K, H, W]` on the layout's finest grid.

        low_level: layer1's grid, for a head that reads it; the logits are then at its stride.
        """
        step = Step.of(sites)
        grid = densify(self.neck(rows, step), step.layout)
        return self.decode(grid, step.layout.stride, low_level)

    def neck(self, rows: Tensor, step: Step) -> Tensor:
        """What runs on rows, `[step.num_run, in_channels]` to `[step.layout.num_sites, channels]`."""
        return step.complete(rows, step, self)

    def decode(self, grid: Tensor, stride: int, low_level: Tensor | None = None) -> Tensor:
        """What runs on the densified grid, `[B, channels, H, W]` to `[B, K, H, W]`."""
        return self.classify(at_dense_spacing(self.refine, grid, stride))

    def classify(self, grid: Tensor) -> Tensor:
        """What follows `refine`: 1x1 alone, `[B, channels, H, W]` to `[B, K, H, W]`."""
        return self.classifier(grid)

    def patch(
        self, coarse: Tensor, rows: Tensor, layout: SiteLayout, low_level: Tensor | None = None
    ) -> Tensor:
        """Logits on the finest grid: of split cells decoded at their own level, of others the coarse pass's.

        Args:
            coarse: its logits `[B, K, h, w]` on the lattice (on layer1's grid, for a head that writes it).
            rows: the neck's, `[layout.num_sites, channels]`.
        """
        logits, grids = coarse, list(dense_levels(rows, layout))[1:]
        for split, grid, stride in zip(layout.splits, grids, layout.strides[1:], strict=True):
            if self.decodes_cells:
                step = max(1, FINEST_DENSE_STRIDE // stride)
                own, cells = decode_split_cells(self.refine, self.classify, grid, split, step)
                size = (grid.shape[2], grid.shape[3])
                logits = with_cells(double(logits, size), cells, own)
            else:
                whole = self.decode(grid, stride, low_level)
                size = (whole.shape[2], whole.shape[3])
                before = logits if logits.shape == whole.shape else double(logits, size)
                logits = torch.where(enlarged(split, size), whole, before)
        return logits

    @property
    def decodes_cells(self) -> bool:
        """Whether `decode` reads neighbours by the first layer of `refine` alone, so that it can run on some
        cells."""
        if type(self).decode is not Head.decode:
            return False
        return not any(reads_neighbours(layer) for layer in list(layers(self.refine))[1:])

    @property
    def num_classes(self) -> int:
        """K."""
        return self.classifier.out_channels

    def plain(self, stride: int) -> PlainHead:
        """A copy that runs dense on grids at `stride` px."""
        neck = nn.Sequential(*(plain(self.get_submodule(name), stride) for name in self.NECK))
        others = {name: copy.deepcopy(c) for name, c in self.named_children() if name not in self.NECK}
        return PlainHead(neck, rebuilt(self, others), stride)

    def neck_macs(self, step: Step) -> int:
        """Multiply-adds of `neck`."""
        return sum(row_macs(self.get_submodule(name), step) for name in self.NECK)

    def patch_macs(self, layout: SiteLayout, low_level: SiteLayout) -> int:
        """Multiply-adds of `patch`."""
        if not self.decodes_cells:
            finer = zip(layout.sizes[1:], layout.strides[1:], strict=True)
            grids = (SiteLayout(layout.batch, size, stride) for size, stride in finer)
            return sum(self.decode_macs(grid, low_level) for grid in grids)
        cells = sum(int(new.shape[0]) for new in layout.level_cells) + sum(
            int(s.sum()) for s in layout.splits
        )
        return grid_macs(self.refine, cells) + grid_macs(self.classifier, cells)

    def decode_macs(self, layout: SiteLayout, low_level: SiteLayout) -> int:
        """Multiply-adds of `decode`; `low_level` are layer1's sites."""
        cells = layout.batch * layout.size[0] * layout.size[1]
        others = (child for name, child in self.named_children() if name not in self.NECK)
        return sum(grid_macs(child, cells) for child in others)


class PlainHead(nn.Module):
    """A head on grids."""

    def __init__(self, neck: nn.Module, rest: Head, stride: int) -> None:
        super().__init__()
        self.neck, self.rest, self.stride = neck, rest, stride

    def forward(self, grid: Tensor, low_level: Tensor) -> Tensor:
        """`[B, in_channels, H, W]` to `[B, K, H, W]`."""
        return self.rest.decode(self.neck(grid), self.stride, low_level)


class LiteHead(Head):
    """1x1 reduction on rows, densify, depthwise 3x3 and 1x1, classifier; 128 channels by default.

    Args:
        dropout: share of whole channels dropped before the classifier in training.
    """

    NECK = ("reduce",)

    def __init__(self, options: HeadOptions, dropout: float = 0.1) -> None:
        super().__init__()
        channels = options.channels or 128
        self.reduce = linear_norm_relu(options.in_channels, channels)
        self.refine = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Dropout2d(dropout),
        )
        self.classifier = nn.Conv2d(channels, options.num_classes, 1)

    def neck(self, rows: Tensor, step: Step) -> Tensor:
        return step.complete(self.reduce(rows), step, self)


class FCNHead(Head):
    """Densify, dense 3x3, classifier (Long et al., CVPR 2015); in training also on layer3.

    By default a quarter of the input's channels.
    """

    def __init__(self, options: HeadOptions, dropout: float = 0.1) -> None:
        super().__init__()
        channels = options.channels or max(options.in_channels // 4, 1)
        self.refine = conv_norm_relu(options.in_channels, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, options.num_classes, 1)

    def classify(self, grid: Tensor) -> Tensor:
        return self.classifier(self.dropout(grid))


def conv_norm_relu(in_channels: int, channels: int, separable: str = "none") -> nn.Sequential:
    """Dense 3x3, batch norm, ReLU; or the depthwise and 1x1 convolutions that stand for the 3x3."""
    last = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    if separable == "none":
        return nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), *last)
    depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
    between = [nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True)] if separable == "normed" else []
    pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
    return nn.Sequential(depthwise, *between, pointwise, *last)
