"""What is early, on rows or late, and where each value stands: `graph/geometry.py` by its definitions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from tests.graph.layers import Drawn, Layer
from tests.slow_reference import once

NEVER = 1 << 20


class Definitions:
    """Of a network at strides, px, for images of `size` px; where it runs dense, at `stride`."""

    def __init__(
        self, network: Drawn, strides: Sequence[int], size: tuple[int, int], stride: int | None
    ) -> None:
        self.network, self.strides, self.size, self.stride = network, tuple(strides), size, stride
        self.layers = {layer.name: layer for layer in network.layers}
        self.finest = strides[0] if stride is None else stride

    @functools.cached_property
    def own(self) -> int:
        """Output stride of the network as drawn."""
        return max(layer.stride for layer in self.network.layers)

    def users(self, name: str) -> list[Layer]:
        return [layer for layer in self.network.layers if name in layer.inputs]

    @once
    def spacing(self, name: str) -> int:
        """The largest power of two, px, that all taps' distances are multiples of; 0: no window."""
        layer = self.layers[name]
        if layer.kernel == (1, 1):
            return 0
        y, x = layer.offsets(self.size, self.layers[layer.inputs[0]].stride)
        common = math.gcd(*y, *x)
        return common & -common if common else NEVER

    @once
    def resized(self, name: str) -> bool:
        layer = self.layers[name]
        return layer.kind == "resize" or any(
            self.resized(one) for one in layer.inputs if self.layers[one].stride
        )

    def keeps_phases(self, name: str) -> bool:
        return self.spacing(name) > self.strides[0] and not self.resized(name) and not self.closes(name)

    @once
    def farthest(self, name: str) -> int:
        """The largest of `spacing` of windows on rows above, at most the coarsest stride."""
        inputs = [one for one in self.layers[name].inputs if self.layers[one].stride]
        own = [
            self.spacing(one)
            for one in inputs
            if self.spacing(one) > self.strides[0] and not self.resized(one)
        ]
        return min(max([0, *own, *map(self.farthest, inputs)]), self.strides[-1])

    @once
    def closes(self, name: str) -> bool:
        """Whether a window of neighbouring cells, as drawn, comes behind all that keep coarser phases."""
        near = self.strides[0] < self.spacing(name) <= min(self.own, self.farthest(name) - 1)
        return near and not self.resized(name) and not self.below(name)

    @once
    def above(self, name: str) -> bool:
        """Whether a window that keeps phases is somewhere above."""
        inputs = [one for one in self.layers[name].inputs if self.layers[one].stride]
        return any(self.above(one) or self.keeps_phases(one) for one in inputs)

    @once
    def below(self, name: str) -> bool:
        users = [user.name for user in self.users(name) if user.stride]
        return any(self.below(one) or self.keeps_phases(one) for one in users)

    @once
    def mixes(self, name: str) -> bool:
        return 0 < self.spacing(name) <= self.strides[0] and self.above(name) and not self.resized(name)

    @once
    def late(self, name: str) -> bool:
        if not self.layers[name].stride:
            return False
        ends = self.resized(name) or self.closes(name) or (self.mixes(name) and not self.below(name))
        return ends or any(self.late(one) for one in self.layers[name].inputs)

    @once
    def kind(self, name: str) -> str:
        if not self.layers[name].stride:
            return "vector"
        if self.late(name):
            return "late"
        return "rows" if self.natural(name) > self.strides[0] else "early"

    @once
    def natural(self, name: str) -> int:
        layer = self.layers[name]
        bounds = [layer.options.get("natural", NEVER)]
        users = self.users(name)
        for user in users:
            if not user.stride and self.gated(user.name) <= self.strides[0]:
                bounds.append(layer.stride)
            elif not user.stride or self.late(user.name):
                bounds.append(layer.stride if layer.stride < self.own else NEVER)
            else:
                bounds.append(self.natural(user.name))
                if self.spacing(user.name) and not self.mixes(user.name):
                    bounds.append(self.spacing(user.name))
        return min(bounds)

    def gated(self, name: str) -> int:
        """The smallest natural stride of the values that a vector is part of."""
        users = [user for user in self.users(name) if not self.late(user.name)]
        strides = [self.natural(one.name) if one.stride else self.gated(one.name) for one in users]
        return min(strides, default=NEVER)

    def cell(self, name: str) -> int:
        """Stride of a value's grid: the lattice's, where it is on mixed levels."""
        layer = self.layers[name]
        if not self.late(name):
            coarsest = self.strides[-1] if self.stride is None else self.stride
            return min(self.natural(name), coarsest if self.kind(name) == "rows" else self.finest)
        if layer.kind == "resize":
            return layer.stride
        return max(
            self.finest if self.kind(one) == "rows" else self.cell(one)
            for one in layer.inputs
            if self.layers[one].stride
        )

    @property
    def lattice_pools(self) -> bool:
        """Whether vectors of the lattice reach rows' windows: all fine then differs from dense."""
        rows = [
            layer
            for layer in self.network.layers
            if layer.kind == "mean" and self.kind(layer.inputs[0]) == "rows"
        ]
        return any(not self._is_final(layer) for layer in rows)

    def _is_final(self, layer: Layer) -> bool:
        reach, more = {layer.name}, True
        while more:
            new = {user.name for name in reach for user in self.users(name)} - reach
            reach, more = reach | new, bool(new)
        windows = any(self.spacing(name) and self.kind(name) == "rows" for name in reach)
        return not windows and not any(self.pools_rows(name) for name in reach - {layer.name})

    def pools_rows(self, name: str) -> bool:
        layer = self.layers[name]
        return layer.kind == "mean" and self.kind(layer.inputs[0]) == "rows"

    @once
    def _depends(self, name: str) -> bool:
        """On the mask everywhere, by a last pooling."""
        layer = self.layers[name]
        if self.pools_rows(name) and self._is_final(layer):
            return True
        return any(self._depends(one) for one in layer.inputs)
