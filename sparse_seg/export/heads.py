"""Static forms of the heads: a neck on sites, and what follows densify, on a grid or on rows of fine
cells."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.errors import SparseSegError
from sparse_seg.export.layers import Conv, Depthwise, static_conv
from sparse_seg.export.sites import Lattice, Sites, rows_to_grid
from sparse_seg.export.upsample import Upsample, grid_size
from sparse_seg.models.aspp import SelectiveSeparableConv2d
from sparse_seg.models.heads import FINEST_DENSE_STRIDE, LOW_LEVEL_STRIDE
from sparse_seg.ops.upsample import at_least_float32


class Layers(nn.Module):
    """What an `nn.Sequential` of dense convolutions and ReLUs does, on a grid or on rows.

    Args:
        spacing: px between the taps of its 3x3 convolutions; on a coarser grid they lie one cell apart.
    """

    def __init__(self, modules: nn.Sequential, spacing: int) -> None:
        super().__init__()
        self.convs: Any = nn.ModuleList()
        self.relus: list[bool] = []
        parts = [module for module in modules if isinstance(module, (nn.Conv2d, nn.ReLU))]
        for module, after in itertools.zip_longest(parts, parts[1:]):
            if isinstance(module, nn.Conv2d):
                weight, form = module.weight.permute(0, 2, 3, 1), Conv if module.groups == 1 else Depthwise
                self.convs.append(form(weight, module.bias, spacing if weight.shape[1] == 3 else 0))
                self.relus.append(isinstance(after, nn.ReLU))

    def on_grid(self, grid: Tensor, stride: int) -> Tensor:
        for conv, relu in zip(self.convs, self.relus, strict=True):
            grid = conv.on_lattice(Lattice(grid, stride), stride)
            grid = F.relu(grid) if relu else grid
        return grid

    def on_rows(self, rows: Tensor) -> Tensor:
        """Taps `[M * 9, C]` of the first convolution, a 3x3, to rows `[M, O]`; the others are 1x1."""
        for conv, relu in zip(self.convs, self.relus, strict=True):
            rows = conv.extra(rows)
            rows = F.relu(rows) if relu else rows
        return rows


class LiteNeck(nn.Module):
    """1x1, norm, ReLU; without a layer it passes on what it gets (FCN's)."""

    def __init__(self, reduce: Any = None) -> None:
        super().__init__()
        self.reduce = None if reduce is None else static_conv(reduce[0])

    def start(self, lattice: Lattice) -> Lattice:
        """The part that does not depend on extra sites."""
        if self.reduce is None:
            return lattice
        return Lattice(F.relu(self.reduce.on_lattice(lattice, lattice.stride)), lattice.stride)

    def finish(self, started: Lattice, sites: Sites) -> Sites:
        """The neck's output on sites, `started` on their lattice."""
        if self.reduce is None:
            return sites
        extras = {stride: F.relu(self.reduce.extra(rows)) for stride, rows in sites.extras.items()}
        return Sites(started, extras, sites.splits)


class SeparableConv(nn.Module):
    """Depthwise 3x3 (with ReLU, or without) and 1x1."""

    def __init__(self, separable: SelectiveSeparableConv2d) -> None:
        super().__init__()
        depthwise = separable.depthwise
        self.depthwise = Depthwise(depthwise.weight, depthwise.bias, depthwise.spacing)
        self.pointwise, self.normed = static_conv(separable.pointwise), separable.norm is not None

    def on_lattice(self, lattice: Lattice, stride: int) -> Tensor:
        grid = self.depthwise.on_lattice(lattice, stride)
        return self.pointwise.lattice(F.relu(grid) if self.normed else grid)

    def on_extras(self, sites: Sites, strides: list[int]) -> dict[int, Tensor]:
        rows = self.depthwise.on_extras(sites, strides)
        return {t: self.pointwise.extra(F.relu(own) if self.normed else own) for t, own in rows.items()}


class ASPPNeck(nn.Module):
    """ASPP on sites; the interface of `LiteNeck`.

    The pooled vector depends on all sites, so `finish` adds it, to the lattice too.
    """

    def __init__(self, aspp: Any) -> None:
        super().__init__()
        self.point, self.pool = static_conv(aspp.point[0]), static_conv(aspp.pool[0])
        self.atrous: Any = nn.ModuleList(
            SeparableConv(branch) if isinstance(branch, SelectiveSeparableConv2d) else static_conv(branch)
            for branch in aspp.atrous
        )
        self.project = self.pooled = None
        if aspp.project is not None:
            pooled = int(self.pool.lattice.bias.shape[0])
            weight, bias = aspp.project[0].weight, aspp.project[0].bias
            self.project, self.pooled = Conv(weight[:, :-pooled], bias), Conv(weight[:, -pooled:])

    def start(self, lattice: Lattice) -> Lattice:
        stride = lattice.stride
        branches = [F.relu(conv.on_lattice(lattice, stride)) for conv in (self.point, *self.atrous)]
        local = torch.cat(branches, 1)
        return Lattice(local if self.project is None else self.project.lattice(local), stride)

    def finish(self, started: Lattice, sites: Sites) -> Sites:
        strides = list(sites.extras)
        branches = [conv.on_extras(sites, strides) for conv in self.atrous]
        extras = {}
        for stride, rows in sites.extras.items():
            parts = [self.point.extra(rows), *(branch[stride] for branch in branches)]
            local = torch.cat([F.relu(part) for part in parts], 1)
            extras[stride] = local if self.project is None else self.project.extra(local)
        pooled = F.relu(self.pool.extra(mean_by_area(sites)))  # [B, P]
        if self.pooled is not None:
            pooled = self.pooled.extra(pooled)
        grid = self._join(started.grid, pooled[:, :, None, None], 1)
        extras = {
            stride: self._join(rows, _by_image(pooled, int(rows.shape[0])), 1)
            for stride, rows in extras.items()
        }
        return Sites(Lattice(grid, started.stride), extras, sites.splits)

    def _join(self, local: Tensor, pooled: Tensor, axis: int) -> Tensor:
        if self.project is not None:
            return F.relu(local + pooled)
        shape = list(local.shape)
        shape[axis] = int(pooled.shape[axis])
        return torch.cat([local, pooled.expand(shape)], axis)


def _by_image(vectors: Tensor, rows: int) -> Tensor:
    """Vectors `[B, P]` of images, for rows of extra sites: `[1 or rows, P]`."""
    batch, channels = map(int, vectors.shape)
    if batch == 1:
        return vectors
    return vectors[None, :, None].expand(3, batch, rows // (3 * batch), channels).reshape(rows, channels)


def mean_by_area(sites: Sites) -> Tensor:
    """`[B, C]`: the mean of all sites, each as often as the cells of the finest grid that it stands for.

    Splitting a cell takes three quarters of its area from its own site and gives them to the extra ones.
    """
    lattice, batch = sites.lattice, sites.lattice.batch
    if not sites.extras:
        return lattice.grid.mean((2, 3))
    levels, area = len(sites.extras), lattice.size[0] * lattice.size[1]
    total = at_least_float32(lattice.grid).sum((2, 3)) * 4**levels
    count = total.new_full((batch, 1), area * 4**levels)
    for level, (stride, rows) in enumerate(sites.extras.items(), start=1):
        split, weight = sites.splits[stride], 4 ** (levels - level)
        exists = (split.cells < split.plan.cells).float().reshape(batch, -1, 1)
        own = sites.values(2 * stride).index_select(0, split.cells.clamp(max=split.plan.cells - 1))
        inside = split.plan.inside.index_select(1, split.cells).reshape(3, batch, -1, 1)
        new = (rows.reshape(3, batch, -1, lattice.channels) * inside).sum((0, 2))
        total = total + weight * (new - 3 * (own.reshape(batch, -1, lattice.channels) * exists).sum(1))
        count = count + weight * (inside.sum((0, 2)) - 3 * exists.sum(1))
    return (total / count).to(lattice.grid.dtype)


NECKS: dict[tuple[str, ...], Any] = {(): LiteNeck, ("reduce",): LiteNeck, ("aspp",): ASPPNeck}


class Head(nn.Module):
    """Neck, densify, dense convolutions, classifier.

    Raises:
        SparseSegError: a head that has no static form.
    """

    stride: int | None = None  # of its logits; None: that of the grid it runs on

    def __init__(self, head: Any) -> None:
        super().__init__()
        if head.NECK not in NECKS:
            raise SparseSegError(f"a {type(head).__name__} cannot be exported; choose another model.head")
        self.neck: Any = NECKS[head.NECK](*(getattr(head, name) for name in head.NECK))
        self.refine = Layers(head.refine, FINEST_DENSE_STRIDE)
        self.classifier = Conv(head.classifier.weight[:, :, 0, 0], head.classifier.bias)

    def decode(self, grid: Tensor, stride: int, low_level: Lattice) -> Tensor:
        """A grid `[B, C, h, w]` of the neck's output at `stride` to logits `[B, K, h, w]`."""
        return self.classifier.lattice(self.refine.on_grid(grid, stride))

    def whole(self, sites: Sites, low_level: Lattice) -> Tensor:
        """The neck's output on sites, densified and decoded everywhere."""
        finest = min([sites.lattice.stride, *sites.extras])
        if not sites.extras:
            return self.decode(sites.lattice.grid, finest, low_level)
        split = sites.splits[finest]
        rows = sites.values(finest, "linear")
        return self.decode(rows_to_grid(rows, split.plan.batch, split.plan.fine), finest, low_level)

    def patch(self, coarse: Tensor, sites: Sites) -> Tensor:
        """Logits of the coarse pass, with those of each split cell's four places decoded at their own level.

        Between two cells logits are interpolated, as the last upsampling does anyway.
        """
        rows = Lattice(coarse, sites.lattice.stride).rows
        for stride, extras in sites.extras.items():
            split = sites.splits[stride]
            step = max(1, FINEST_DENSE_STRIDE // stride)
            taps = split.surroundings(sites.values(2 * stride, "linear"), extras, step)
            rows = split.complete(rows, self.classifier.extra(self.refine.on_rows(taps)))
        return rows_to_grid(rows, split.plan.batch, split.plan.fine)


class PlusHead(Head):
    """DeepLabV3+: behind `refine`, upsampling to stride 4, the projected skip, and a decoder."""

    stride = LOW_LEVEL_STRIDE

    def __init__(self, head: Any, size: tuple[int, int], strides: Sequence[int]) -> None:
        super().__init__(head)
        self.joins = nn.ModuleDict()
        for stride in strides:
            cells, skip = (grid_size(size, s) for s in (stride, LOW_LEVEL_STRIDE))
            ratio = (stride // LOW_LEVEL_STRIDE, head.trained_stride // LOW_LEVEL_STRIDE)
            self.joins[str(stride)] = Upsample(cells, skip, *ratio, head.align_corners)
        self.low_level = Layers(head.low_level, LOW_LEVEL_STRIDE)
        stages: Any = head.decoder
        self.decoder: Any = nn.ModuleList(Layers(layers, LOW_LEVEL_STRIDE) for layers in stages)
        self.trained_stride, self.align_corners = head.trained_stride, head.align_corners

    def decode(self, grid: Tensor, stride: int, low_level: Lattice) -> Tensor:
        grid, unit = self.refine.on_grid(grid, stride), LOW_LEVEL_STRIDE
        if stride == self.trained_stride:
            up = F.interpolate(grid, size=low_level.size, mode="bilinear", align_corners=self.align_corners)
        else:
            up = self.joins[str(stride)](grid)
        grid = torch.cat([up, self.low_level.on_grid(low_level.grid, unit)], 1)
        for layers in self.decoder:
            grid = layers.on_grid(grid, unit)
        return self.classifier.lattice(grid)


def static_head(head: Any, size: tuple[int, int], strides: Sequence[int]) -> Head:
    """The static form of a head for images of a size, run at the given strides."""
    return PlusHead(head, size, strides) if head.reads_low_level else Head(head)
