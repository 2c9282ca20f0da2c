"""A drawn network by taps in pixels: no strides but those of the sites, no regions but by definition.

What runs before the sites end is computed at every pixel (a strided layer as a dilated one), so that any
output stride is a choice of places. On mixed levels a value stands on the whole grid at the finest stride,
where places without a site hold what the exchange rule gives (`tests/slow_reference.py`). Under `separate` a
window runs once for each level, on a grid of its sites alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.definitions import Definitions
from tests.graph.layers import Drawn, Layer
from tests.slow_reference import SlowSites, once


class Reference(Definitions):
    """One run.

    Args:
        network: in float64; its modules are used, so training changes running statistics.
        strides: px, finest first.
        images: `[B, 3, H, W]`.
        stride: dense at this output stride; or
        levels: int64 `[B, Hc, Wc]`: mixed, with `exchange`.
        before: the step that this one refines: its sites keep their values.
    """

    def __init__(
        self,
        network: Drawn,
        strides: Sequence[int],
        images: Tensor,
        stride: int | None = None,
        levels: Tensor | None = None,
        exchange: str = "linear",
        before: Reference | None = None,
    ) -> None:
        super().__init__(network, strides, (int(images.shape[2]), int(images.shape[3])), stride)
        self.images, self.levels, self.exchange, self.before = images, levels, exchange, before
        self.units: dict[str, int] = {}
        self.values: dict[str, Tensor] = {}
        self.macs = 0
        for layer in network.layers:
            self.values[layer.name] = self._value(layer)

    @property
    def output(self) -> Tensor:
        """Logits on their grid, before the last upsampling."""
        last = self.network.layers[-1]
        if last.kind == "resize" and last.stride == 1:
            last = self.layers[last.inputs[0]]
        return (
            self._exit(last.name)
            if self.kind(last.name) == "rows"
            else self._at(last.name, self.cell(last.name))
        )

    # -- sites ---------------------------------------------------------------------------------------------

    @once
    def sites(self, lattice: int) -> SlowSites:
        assert self.levels is not None
        size = -(-self.size[0] // self.finest), -(-self.size[1] // self.finest)
        splits = []
        for number, stride in enumerate(self.strides[:0:-1]):
            if stride > lattice:
                continue
            scale = self.strides[-1] // stride
            split = (self.levels > number).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            rows, columns = -(-self.size[0] // stride), -(-self.size[1] // stride)
            splits.append(split[:, :rows, :columns])
        return SlowSites(len(self.images), size, splits)

    def _held(self, layer: Layer, grid: Tensor) -> Tensor:
        """A grid at the finest stride, by the exchange rule where there is no site."""
        lattice = self.cell(layer.name)
        if lattice == self.finest:
            return grid
        sites = self.sites(lattice)
        rows = sites.read(grid)
        if self.before is not None and not self._depends(layer.name):
            old, known = sites.read(self.before.values[layer.name]), self.before.sites(lattice).rows_of[-1]
            rows = torch.where(torch.tensor([[cell in known] for cell in sites.cells]), old, rows)
        return sites.rebuild(rows, self.exchange)

    # -- values --------------------------------------------------------------------------------------------

    def _value(self, layer: Layer) -> Tensor:
        name = layer.name
        if layer.kind == "image":
            self.units[name] = 1
            return self.images
        if not layer.stride:
            return self._vector(layer)
        if layer.kind == "resize":
            self.units[name] = self.cell(name)
            return self._resize(layer)
        kind, mixed = self.kind(name), self.stride is None
        if kind == "late" or (self.mixes(name) and not mixed):
            units = {one: self.cell(one) for one in layer.inputs if self.layers[one].stride}
            if mixed:
                units = {
                    one: self.finest if self.kind(one) == "rows" else cell for one, cell in units.items()
                }
            unit = max(units.values())
            read = [
                self.values[one] if one not in units
                else self._exit(one) if mixed and self.kind(one) == "rows"
                else self._at(one, unit)
                for one in layer.inputs
            ]  # fmt: skip
        else:
            unit = max(self.units[one] for one in layer.inputs if self.layers[one].stride)
            if mixed and layer.before is not None and self._between(layer) > self.finest:
                unit = self.finest
            read = [
                self._at(one, unit) if self.layers[one].stride else self.values[one] for one in layer.inputs
            ]
        out = self._apply(layer, read, unit)
        self.units[name] = unit
        if kind == "rows" and mixed:
            out = out[:, :, :: self.finest // unit, :: self.finest // unit]
            self.units[name] = self.finest
            out = self._held(layer, self._norm(layer, out, 1) if layer.kind == "norm" else out)
        elif layer.kind == "norm":
            out = self._norm(layer, out, max(1, self.cell(name) // unit))
        self._count(layer)
        return out

    def _at(self, name: str, unit: int) -> Tensor:
        step = unit // self.units[name]
        return self.values[name][:, :, ::step, ::step]

    def _exit(self, name: str) -> Tensor:
        """A value on rows, densified."""
        if self.stride is not None:
            return self._at(name, self.cell(name))
        if self.cell(name) == self.finest:
            return self.values[name]
        sites = self.sites(self.cell(name))
        return sites.rebuild(sites.read(self.values[name]), "linear")

    def _apply(self, layer: Layer, read: list[Tensor], unit: int) -> Tensor:
        if layer.kind == "norm":
            return read[0]
        if layer.kind == "place" or layer.kernel == (1, 1):
            call = layer.call or (nn.Identity() if layer.kind == "norm" else layer.module)
            assert call is not None
            if isinstance(call, nn.Conv2d):
                return F.conv2d(read[0], call.weight, call.bias, groups=call.groups)
            return call(*read)
        return self._window(layer, read[0], unit)

    def _window(self, layer: Layer, x: Tensor, unit: int) -> Tensor:
        captured = self.layers[layer.inputs[0]].stride
        offsets = layer.offsets(self.size, captured)
        steps = []
        for places, dilation in zip(offsets, layer.dilation, strict=True):
            spacing = dilation * captured
            cells = max(1, spacing // unit)  # taps closer than a cell move a cell apart
            steps.append([place * cells // spacing for place in places])
        outside, there = x.new_zeros(1, x.shape[1], 1, 1), self._there(layer.inputs[0], x)
        if layer.before is not None:
            x, outside = layer.before(x), layer.before(outside)
            self.macs += _weights(layer.before)  # once, of what stands outside
            x = self._held_between(layer, x - outside, unit) + outside
        level = self._levels_of_source(layer)
        if level is None:
            return self._taps(layer, x, there, outside, steps)
        parts = [
            self._taps(layer, x.where(level == n, outside), there & (level == n), outside, steps).where(
                level == n, 0.0
            )
            for n in range(len(self.strides))
        ]
        return torch.stack(parts).sum(0)

    def _levels_of_source(self, layer: Layer) -> Tensor | None:
        """`[B, 1, H, W]` on the finest grid, under `separate`: the level of each place's block, of a value on
        rows."""
        source = layer.inputs[0]
        lattice = self._between(layer) if layer.before is not None else self.cell(source)
        on_rows = layer.before is not None or self.kind(source) == "rows"
        late = self.kind(layer.name) == "late"
        if self.exchange != "separate" or self.stride is not None or not on_rows or late:
            return None
        return self._levels(lattice) if lattice > self.finest else None

    @once
    def _levels(self, lattice: int) -> Tensor:
        sites, (height, width) = self.sites(lattice), self.sites(lattice).size
        cells = [(b, y, x) for b in range(sites.batch) for y in range(height) for x in range(width)]
        levels = torch.tensor([sites.level(cell) for cell in cells])
        return levels.view(sites.batch, 1, height, width)

    def _taps(
        self, layer: Layer, x: Tensor, there: Tensor, outside: Tensor, steps: list[list[int]]
    ) -> Tensor:
        """A window over a grid, its taps at `steps` cells."""
        if layer.kind == "conv":
            assert isinstance(layer.module, nn.Conv2d)
            weight, bias, (down, right) = layer.module.weight, layer.module.bias, map(_spacing, steps)
            x, groups = _padded(x, steps, outside), layer.module.groups
            return F.conv2d(x, weight, bias, dilation=(down, right), groups=groups)
        fill = x.new_full((1, 1, 1, 1), -math.inf if layer.kind == "max" else 0.0)
        taps = _unfolded(torch.where(there, x, fill), steps, fill)
        if layer.kind == "max":
            return taps.amax(0)
        if layer.options["outside"]:
            return taps.mean(0)
        count = _unfolded(there, steps, there.new_zeros(1, 1, 1, 1)).sum(0)
        return taps.sum(0) / count.clamp_min(1)

    def _there(self, name: str, x: Tensor) -> Tensor:
        """`[B, 1, h, w]` bool: under `none` and `separate` places without a site are as those outside."""
        ones = torch.ones_like(x[:, :1])
        mixed = self.stride is None and self.kind(name) == "rows" and self.cell(name) > self.finest
        if mixed and self.exchange in ("none", "separate"):
            sites = self.sites(self.cell(name))
            ones = sites.rebuild(sites.read(ones), "none")
        return ones > 0

    def _between(self, layer: Layer) -> int:
        """Stride of the grid, or lattice, of what a convolution with `before` reads."""
        finest, coarsest = self.finest, self.strides[-1] if self.stride is None else self.stride
        if self.late(layer.name):
            return self.finest
        stride = min(self.natural(layer.name), self.spacing(layer.name))
        return min(stride, coarsest if stride > self.strides[0] else finest)

    def _held_between(self, layer: Layer, x: Tensor, unit: int) -> Tensor:
        """What a convolution with `before` reads is a value of its own, where its reader needs it."""
        lattice = self._between(layer)
        if self.stride is not None or lattice <= self.finest:
            return x
        assert unit == self.finest
        sites = self.sites(lattice)
        return sites.rebuild(sites.read(x), self.exchange)

    def _norm(self, layer: Layer, grid: Tensor, step: int) -> Tensor:
        """In training by the statistics of all sites, or of a grid's own cells."""
        norm = layer.module
        assert isinstance(norm, nn.BatchNorm2d)
        if not norm.training:
            return norm(grid)
        lattice = self.cell(layer.name)
        mixed = self.stride is None and self.kind(layer.name) == "rows" and lattice > self.finest
        rows = self.sites(lattice).read(grid)[:, :, None, None] if mixed else grid[:, :, ::step, ::step]
        norm(rows)  # moves the running statistics
        mean, var = rows.mean((0, 2, 3)), rows.var((0, 2, 3), correction=0)
        mean, scale = mean.view(1, -1, 1, 1), (var + norm.eps).rsqrt().view(1, -1, 1, 1)
        out = (grid - mean) * scale
        return out * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1) if norm.affine else out

    def _vector(self, layer: Layer) -> Tensor:
        assert layer.kind in ("mean", "vector")
        if layer.kind == "vector":
            assert layer.module is not None
            self._count(layer)
            return layer.module(self.values[layer.inputs[0]])
        source = layer.inputs[0]
        if self.stride is None and self.kind(source) == "rows" and self._is_final(layer):
            return self._mean_by_area(source)
        return self._at(source, self.cell(source)).mean((2, 3), keepdim=True)

    def _mean_by_area(self, name: str) -> Tensor:
        lattice, sites = self.cell(name), self.sites(self.cell(name))
        rows = sites.read(self.values[name])
        levels = torch.tensor([sites.level(cell) for cell in sites.cells])
        weights = 4.0 ** (math.log2(lattice // self.finest) - levels.double())
        images = torch.tensor([image for image, _, _ in sites.cells])
        means = [
            (weights[images == b][:, None] * rows[images == b]).sum(0) / weights[images == b].sum()
            for b in range(len(self.images))
        ]  # fmt: skip
        return torch.stack(means)[:, :, None, None]

    def _resize(self, layer: Layer) -> Tensor:
        """Each pixel reads the place in px that it reads in the network as drawn."""
        (source,), mixed = layer.inputs, self.stride is None
        rows = mixed and self.kind(source) == "rows"
        x = self._exit(source) if rows else self._at(source, self.cell(source))
        cell, captured = (self.finest if rows else self.cell(source)), self.layers[source].stride
        for axis in range(2):
            count, drawn = -(-self.size[axis] // layer.stride), -(-self.size[axis] // captured)
            pixel = torch.arange(count, dtype=torch.float64)
            if layer.options.get("nearest"):
                places = (torch.arange(count) * drawn // count).double()
            elif layer.options["align_corners"]:
                places = pixel * (drawn - 1) / max(count - 1, 1)
            else:
                places = (pixel + 0.5) * drawn / count - 0.5
            places = (places * captured / cell).clamp(0, x.shape[2 + axis] - 1)
            if layer.options.get("nearest"):
                places = places.floor()
            low = places.floor().long()
            high, share = (low + 1).clamp(max=x.shape[2 + axis] - 1), places - low
            shape = [1, 1, 1, 1]
            shape[2 + axis] = count
            share = share.view(shape)
            x = x.index_select(2 + axis, low) * (1 - share) + x.index_select(2 + axis, high) * share
        return x

    # -- cost ----------------------------------------------------------------------------------------------

    def _count(self, layer: Layer) -> None:
        """Multiply-adds of convolutions and linear layers: weights x places that are written."""
        self.macs += _weights(layer.module) * self._places(
            layer, self.cell(layer.name) if layer.stride else 0
        )
        if layer.before is not None:
            self.macs += _weights(layer.before) * self._places(layer, self._between(layer))

    def _places(self, layer: Layer, cell: int) -> int:
        if not cell:
            return len(self.images)
        if self.stride is None and not self.late(layer.name) and cell > self.finest:
            return len(self.sites(cell).cells)
        return len(self.images) * -(-self.size[0] // cell) * -(-self.size[1] // cell)


def _weights(module: nn.Module | None) -> int:
    kinds = nn.Conv2d | nn.Linear
    return sum(one.weight.numel() for one in module.modules() if isinstance(one, kinds)) if module else 0


def _padded(x: Tensor, steps: list[list[int]], outside: Tensor) -> Tensor:
    """What windows read, from the first place's first tap to the last one's last; beyond the border `outside`
    `[1, C, 1, 1]`."""
    size, reach = x.shape[2:], [places[-1] - places[0] for places in steps]
    out = outside.expand(*x.shape[:2], *(a + b for a, b in zip(size, reach, strict=True))).clone()
    into, of = [slice(None)] * 2, [slice(None)] * 2
    for length, places, far in zip(size, steps, reach, strict=True):
        first, last = max(0, places[0]), min(length, places[0] + length + far)
        if first >= last:
            return out
        into.append(slice(first - places[0], last - places[0]))
        of.append(slice(first, last))
    out[tuple(into)] = x[tuple(of)]
    return out


def _unfolded(x: Tensor, steps: list[list[int]], outside: Tensor) -> Tensor:
    """`[taps, B, C, H, W]`: what each tap reads."""
    height, width = x.shape[2:]
    x, (rows, columns) = _padded(x, steps, outside), ([one - places[0] for one in places] for places in steps)
    return torch.stack([x[:, :, y : y + height, z : z + width] for y in rows for z in columns])


def _spacing(places: list[int]) -> int:
    return places[1] - places[0] if len(places) > 1 else 1
