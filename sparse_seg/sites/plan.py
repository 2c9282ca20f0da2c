"""Index tables of a level for one image size: which places its cells have, and what stands around them.

A level adds *extra* sites at `stride` px to cells of the grid at twice that stride: phases 1, 2 and 3 of
a cell lie to its right, below, and diagonally below; phase 0 is the cell's own site. Cells are numbered
over the whole batch, image by image. A table holds numbers alone, so it is made once for a size and kept.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

# where there is no site, phases 1 to 3 are this mean of their cell and the ones right, below, and diagonal
MIX = ((0.5, 0.5, 0.0, 0.0), (0.5, 0.0, 0.5, 0.0), (0.25, 0.25, 0.25, 0.25))
OWN = (1.0, 0.0, 0.0, 0.0)
SHARES = {"linear": (OWN, *MIX), "nearest": (OWN,) * 4, "none": (OWN, *[(0.0,) * 4] * 3)}  # phases 0 to 3

T = TypeVar("T")


class Taps(NamedTuple):
    """Where a window reads, px from the site that it writes: rows `y` and columns `x`, first to last."""

    y: tuple[int, ...]
    x: tuple[int, ...]

    @property
    def number(self) -> int:
        return len(self.y) * len(self.x)

    @property
    def reach(self) -> int:
        """The largest distance along an axis, px."""
        return max(map(abs, self.y + self.x))

    def inside(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """The rows and columns that some place of images of `size` px reads inside them; one at least."""
        parts = []
        for places, length in zip(self, size, strict=True):
            near = [number for number, place in enumerate(places) if abs(place) < length] or [0]
            parts.append(slice(near[0], near[-1] + 1))
        return parts[0], parts[1]

    def part(self, parts: tuple[slice, slice]) -> Taps:
        """The taps of these rows and columns."""
        return Taps(self.y[parts[0]], self.x[parts[1]])

    def fits(self, stride: int) -> bool:
        """Whether all fall on a grid of `stride` px around each of its cells."""
        return all(place % stride == 0 for place in self.y + self.x)


HERE = Taps((0,), (0,))  # the place itself


def grid_size(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """Cells of images of `size` px at a stride."""
    return -(-size[0] // stride), -(-size[1] // stride)


@functools.lru_cache(maxsize=64)
def plan_of(batch: int, size: tuple[int, int], stride: int, device: torch.device) -> LevelPlan:
    """The plan of a level at `stride` for images of `size` px, kept for the next pass."""
    return LevelPlan(batch, size, stride, device)


class LevelPlan:
    """Constant tables of a level, int64, each made at its first use.

    Args:
        batch: number of images.
        size: of the images, px.
        stride: of the level's sites, px.
        in_graph: whether its network becomes a graph, before which one run makes all tables that it reads.

    The number behind the last of a numbering stands for all that lies outside the image.
    """

    def __init__(
        self,
        batch: int,
        size: tuple[int, int],
        stride: int,
        device: torch.device | str = "cpu",
        in_graph: bool = False,
    ) -> None:
        self.batch, self.image, self.stride, self.device = batch, size, stride, torch.device(device)
        self.in_graph = in_graph
        self.fine, self.coarse = grid_size(size, stride), grid_size(size, 2 * stride)
        self.cells = batch * self.coarse[0] * self.coarse[1]
        self.fine_cells = batch * self.fine[0] * self.fine[1]
        self._tables: dict[Hashable, Any] = {}

    def number(self, stride: int) -> int:
        """How many places a complete grid at a stride has."""
        height, width = grid_size(self.image, stride)
        return self.batch * height * width

    @property
    def is_even(self) -> bool:
        """Whether each cell has all four places inside the image."""
        return self.fine_cells == 4 * self.cells

    def around_sites(self, taps: Taps) -> Tensor:
        """`[3, cells, T]`: what taps read around phases 1, 2, 3 of each cell, all at the same phase.

        In numbers `(phase - 1) * cells + cell`; `3 * cells` is outside. The taps fit twice the stride.
        """

        def build() -> Tensor:
            outside = torch.tensor([3 * self.cells], device=self.device)
            return torch.cat([self.phases_of_fine - self.cells, outside])[self.in_grid(taps, self.stride)]

        return self._kept(("sites", taps), build)

    def around_cells(self, taps: Taps) -> Tensor:
        """`[cells, T]`: the cells that taps read around each cell; `cells` is outside."""
        return self._kept(("cells", taps), lambda: self._around(taps, 2 * self.stride, 2 * self.stride)[0])

    def in_grid(self, taps: Taps, stride: int) -> Tensor:
        """`[3, cells, T]`: what taps read around phases 1, 2, 3 in a complete grid at `stride` px, as its
        flat cells; the number of its cells is outside. Stride and taps fit ours and the grid."""
        return self._kept(("grid", taps, stride), lambda: self._around(taps, self.stride, stride)[1:])

    def taps_at(self, taps: Taps, stride: int, source: int) -> Tensor:
        """`[cells, n, T]`: what taps read in a complete grid at `source` px around the n places at `stride`
        px of each cell; the number of its places is outside, and what places outside the image read."""
        key = "places", taps, stride, source
        return self._kept(key, lambda: self._around(taps, stride, source).transpose(0, 1).contiguous())

    def _around(self, taps: Taps, stride: int, source: int) -> Tensor:
        """The same as `[n, cells, T]`."""
        size, own = grid_size(self.image, source), grid_size(self.image, stride)
        count = max(1, 2 * self.stride // stride)
        down = torch.tensor(taps.y, device=self.device).repeat_interleave(len(taps.x))
        right = torch.tensor(taps.x, device=self.device).repeat(len(taps.y))
        cells = [count * axis[:, None] for axis in _cells(self.coarse, self.device)]
        tables = []
        for phase in itertools.product(range(count), repeat=2):
            y, x = (axis + shift for axis, shift in zip(cells, phase, strict=True))
            read_y = torch.div(stride * y + down, source, rounding_mode="floor")
            read_x = torch.div(stride * x + right, source, rounding_mode="floor")
            inside = _inside(read_y, read_x, size) & _inside(y, x, own)
            numbers = self._number(read_y, read_x, size)
            tables.append(numbers.where(inside.repeat(self.batch, 1), self.number(source)))
        return torch.stack(tables)

    @property
    def corners(self) -> Tensor:
        """`[4, cells]`: each cell and those right, below, and diagonal, clamped to the image."""

        def build() -> Tensor:
            y, x = _cells(self.coarse, self.device)
            right, below = (x + 1).clamp(max=self.coarse[1] - 1), (y + 1).clamp(max=self.coarse[0] - 1)
            around = [(y, x), (y, right), (below, x), (below, right)]
            return torch.stack([self._number(*place, self.coarse) for place in around])

        return self._kept("corners", build)

    @property
    def phases_of_fine(self) -> Tensor:
        """`[fine cells]`: `phase * cells + cell` of each place of the level's own grid."""

        def build() -> Tensor:
            y, x = _cells(self.fine, self.device)
            phase = (2 * (y % 2) + x % 2).repeat(self.batch)
            return phase * self.cells + self._number(y // 2, x // 2, self.coarse)

        return self._kept("phases", build)

    @property
    def fine_of_phases(self) -> Tensor:
        """`[4, cells]`: the place in the level's own grid of each cell's phases 0 to 3; `fine_cells` where it
        lies outside."""
        return self._kept("fine", lambda: self._around(HERE, self.stride, self.stride)[:, :, 0])

    @property
    def inside(self) -> Tensor:
        """`[3, cells]` bool: whether phases 1, 2, 3 of a cell lie inside the image."""
        return self._kept("inside", lambda: self.fine_of_phases[1:] < self.fine_cells)

    def mix(self, dtype: torch.dtype) -> Tensor:
        """`MIX` as a tensor `[3, 4]`."""
        return self._kept(dtype, lambda: torch.tensor(MIX, dtype=dtype, device=self.device))

    def shares(self, exchange: str) -> tuple[Tensor, Tensor]:
        """`[4 * cells + 1, 4]` twice: cells, the number behind the last for none, and their shares in the
        value at each place of phases 0 to 3, where there is no site, and at last outside."""

        def build() -> tuple[Tensor, Tensor]:
            shares = torch.tensor(SHARES[exchange], device=self.device)[:, None].expand(4, self.cells, 4)
            places = self.corners.T.expand(4, self.cells, 4).where(shares > 0, self.cells).flatten(0, 1)
            outside = places.new_full((1, 4), self.cells)
            return torch.cat([places, outside]), torch.cat([shares.flatten(0, 1), shares.new_zeros(1, 4)])

        return self._kept(("shares", exchange), build)

    def _kept(self, key: Hashable, build: Callable[[], T]) -> T:
        if key not in self._tables:
            with torch.inference_mode(False):  # kept tables must serve training, too
                self._tables[key] = build()
        return self._tables[key]

    def _number(self, y: Tensor, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Places `[n, ...]` of one image as numbers `[B * n, ...]` over the batch."""
        first = torch.arange(self.batch, device=self.device) * (size[0] * size[1])
        return (first.view(-1, *[1] * y.ndim) + (y * size[1] + x)).flatten(0, 1)


def _cells(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of a grid's cells, `[H * W]` each."""
    y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in size), indexing="ij")
    return y.flatten(), x.flatten()


def _inside(y: Tensor, x: Tensor, size: tuple[int, int]) -> Tensor:
    return (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
