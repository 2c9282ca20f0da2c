"""Exchange rule `separate`: which sites a window reads if levels do not read each other (docs/method.md).

A site belongs to the level of its block: the block's stride, but at most that of the lattice of the value
that is read. A tap on a site of another level reads what lies outside the image, from the lattice, too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

from sparse_seg.sites.level import Level
from sparse_seg.sites.plan import Taps


class Apart:
    """Index tables of windows under `separate`, kept for the next layer that reads the same places.

    Args:
        levels: of a mask, by stride, coarsest first; all sites are run.

    In all methods `base` is the stride of the lattice of the value that is read, px.
    """

    def __init__(self, levels: Mapping[int, Level]) -> None:
        self.levels = levels
        self._kept: dict[Hashable, Tensor] = {}

    def in_grid(self, taps: Taps, stride: int, grid: int, base: int) -> Tensor:
        """`[3 * K * T]`: what taps read around the extra sites at `stride`, in a grid at `grid` px that holds
        the value's sites; the number of its cells where that is none of their level."""

        def build() -> Tensor:
            level = self.levels[stride]
            blocks = self.blocks(stride, base).index_select(0, self._places(level))
            return _same(level.grid_rows(taps, grid), blocks, self.blocks(grid, base))

        return self._once(("extras", taps, stride, grid, base), build)

    def around_lattice(self, taps: Taps, stride: int, grid: int, base: int) -> Tensor:
        """`[cells * T]`: the same around the sites of the lattice at `stride`."""

        def build() -> Tensor:
            rows = self.levels[stride // 2].plan.taps_at(taps, stride, grid).reshape(-1)
            return _same(rows, self.blocks(stride, base)[:-1], self.blocks(grid, base))

        return self._once(("lattice", taps, stride, grid, base), build)

    def in_table(self, taps: Taps, stride: int) -> Tensor:
        """`[3 * K * T]`: the rows of `Level.table`, without ghosts, that taps read around the extra sites at
        `stride`; the last one, zero, where there is none of their level."""

        def build() -> Tensor:
            blocks = self.of_extras(stride)
            outside = blocks.new_zeros(1)
            return _same(self.levels[stride].tap_rows(taps), blocks, torch.cat([blocks, outside]))

        return self._once(("table", taps, stride), build)

    def of_extras(self, stride: int) -> Tensor:
        """`[3 * K]`: the strides of the blocks of the extra sites at `stride`; 0 outside the image."""

        def build() -> Tensor:
            return self.blocks(stride, stride).index_select(0, self._places(self.levels[stride]))

        return self._once(("sites", stride), build)

    def blocks(self, grid: int, base: int) -> Tensor:
        """`[cells + 1]`: the stride of the block of each place of a grid at `grid` px, at most `base`; 0
        where no site stands, and last for outside the image."""

        def build() -> Tensor:
            finest = min(self.levels)
            plan, step = self.levels[finest].plan, grid // finest
            strides = self._finest().reshape(plan.batch, *plan.fine)[:, ::step, ::step].clamp(max=base)
            y, x = (torch.arange(size, device=strides.device) * grid for size in strides.shape[1:])
            stands = (y[:, None] % strides == 0) & (x % strides == 0)
            places = strides.where(stands, 0).reshape(-1)
            return torch.cat([places, places.new_zeros(1)])

        return self._once(("blocks", grid, base), build)

    def _finest(self) -> Tensor:
        """`[fine cells]`: the stride of the block of each place of the finest grid."""
        strides: Tensor | None = None
        for stride, level in self.levels.items():
            if strides is None:
                strides = level.cells.new_full((level.plan.cells,), 2 * stride)
            strides = strides.scatter(0, level.cells, stride)
            strides = strides.index_select(0, level.plan.phases_of_fine % level.plan.cells)
        assert strides is not None
        return strides

    def _places(self, level: Level) -> Tensor:
        """`[3 * K]`: where extra sites stand in their level's own grid; its number of cells outside."""
        return level.plan.fine_of_phases[1:].index_select(1, level.cells).reshape(-1)

    def _once(self, key: Hashable, build: Callable[[], Tensor]) -> Tensor:
        if key not in self._kept:
            self._kept[key] = build()
        return self._kept[key]


def _same(rows: Tensor, own: Tensor, blocks: Tensor) -> Tensor:
    """`[M * T]` rows around M sites in blocks `own`; the last row in place of those of other levels."""
    taps = rows.reshape(int(own.shape[0]), -1) if own.shape[0] else rows.reshape(0, 1)
    same = blocks.index_select(0, taps.reshape(-1)).reshape(taps.shape) == own[:, None]
    return taps.where(same, int(blocks.shape[0]) - 1).reshape(-1)
