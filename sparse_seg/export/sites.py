"""What a static pass works on: complete lattices, and the rows of the extra sites of the cells that are
split.

Rows of extra sites are `[3 * K, C]`, phase by phase; K is the number of split cells in all images. Their
neighbours follow from the numbers of the split cells by integer arithmetic, so every shape is known
beforehand. *Ghosts*, the values where a neighbour has no site, are made for all cells; or, where `near`
asks for it, only for
cells that some extra site reads: less work, but their number depends on the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_seg.export.geometry import LevelPlan


class Lattice:
    """A complete grid `[B, C, h, w]` at `stride` px."""

    def __init__(self, grid: Tensor, stride: int) -> None:
        self.grid, self.stride = grid, stride
        self.batch, self.channels, height, width = map(int, grid.shape)
        self.size = (height, width)
        self._rows: Tensor | None = None
        self._padded_rows: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """`[B * h * w, C]`."""
        if self._rows is None:  # not functools.cached_property: its lock is beyond torch.compile
            area = self.size[0] * self.size[1]
            self._rows = self.grid.permute(0, 2, 3, 1).reshape(self.batch * area, self.channels)
        return self._rows

    @property
    def padded_rows(self) -> Tensor:
        """Rows and, behind them, zero."""
        if self._padded_rows is None:
            self._padded_rows = torch.cat([self.rows, self.grid.new_zeros(1, self.channels)])
        return self._padded_rows


def rows_to_grid(rows: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
    """`[B * H * W, C]` to `[B, C, H, W]`."""
    return rows.reshape(batch, *size, -1).permute(0, 3, 1, 2)


class Split:
    """A level's split cells.

    Args:
        plan: the level's constants.
        cells: `[K]` int64, their numbers.
        count: K.
        exchange: what a neighbour without a site reads: `linear`, `nearest` or `none`.
        near: the steps, in cells, that share ghosts made for near cells only; other steps have those of all
            cells.
    """

    def __init__(
        self, plan: LevelPlan, cells: Tensor, count: int, exchange: str, near: Sequence[int] = ()
    ) -> None:
        self.plan, self.cells, self.count, self.exchange = plan, cells, count, exchange
        self.near_steps = tuple(near) if exchange != "none" else ()
        self._indices: dict[tuple[str, int], Tensor] = {}
        self._kinds: dict[str, tuple[Tensor, Tensor | None]] = {}

    def is_near(self, step: int) -> bool:
        """Whether taps so far apart find their ghosts among those of near cells."""
        return step in self.near_steps

    def tap_rows(self, step: int) -> Tensor:
        """`[3 * K * 9]`: the rows of the table that the nine taps read, `step` cells apart."""
        if ("taps", step) not in self._indices:
            read = self.plan.neighbours(step).index_select(1, self.cells).reshape(-1)
            self._indices["taps", step] = self._rows(self.is_near(step))[0].index_select(0, read)
        return self._indices["taps", step]

    def patch_taps(self, padded_fine: Tensor, step: int) -> Tensor:
        """What nine taps read in a complete grid at the level's own stride: `[3 * K * 9, C]`.

        padded_fine: `[fine cells + 1, C]`, the last row zero.
        """
        if ("patch", step) not in self._indices:
            index = self.plan.patches(step).index_select(1, self.cells)
            self._indices["patch", step] = index.reshape(-1)
        return padded_fine.index_select(0, self._indices["patch", step])

    def surroundings(self, source: Tensor, extras: Tensor, step: int) -> Tensor:
        """What nine taps read around phases 0 to 3, `step` fine cells apart: `[4 * K * 9, C]`.

        They read the densified grid: interpolated where there is no site.
        """
        plan, near = self.plan, self.is_near(1)
        rows, ghosts = self._rows(near, "linear")
        table = self.table(source, extras, near, "linear")
        if ("surroundings", step) not in self._indices:
            first = 3 * (self.count + (plan.outside if ghosts is None else ghosts.shape[0])) + 1
            own = torch.arange(plan.outside, device=self.cells.device) + first
            around = plan.surroundings(step).index_select(1, self.cells).reshape(-1)
            self._indices["surroundings", step] = torch.cat([own, rows]).index_select(0, around)
        return torch.cat([table, source]).index_select(0, self._indices["surroundings", step])

    def complete(self, source: Tensor, rows: Tensor, exchange: str = "linear") -> Tensor:
        """All values of the fine grid, `[fine cells, C]`.

        rows: `[P * K, C]`, values of the split cells' last P of four phases.
        """
        plan, channels = self.plan, int(source.shape[1])
        ghosts = self.ghosts(source, None, exchange)
        if plan.ragged:
            source = torch.cat([source, source.new_zeros(1, channels)])
        values = torch.cat([source, ghosts])
        phases = int(rows.shape[0]) // self.count
        first = torch.arange(4 - phases, 4, device=self.cells.device)[:, None] * plan.outside
        values = values.index_put(((first + self.cells).reshape(-1),), rows)
        return values.index_select(0, plan.places)

    def ghosts(self, source: Tensor, cells: Tensor | None, exchange: str) -> Tensor:
        """`[3 * n, C]`: phases 1, 2, 3 of cells (None: of all) as if they had no site."""
        plan, channels = self.plan, int(source.shape[1])
        if exchange == "none":
            return source.new_zeros(3 * plan.outside, channels)
        corners = plan.corners if cells is None else plan.corners.index_select(1, cells)
        if exchange == "nearest":
            return source.index_select(0, corners[0]).repeat(3, 1)
        four = source.index_select(0, corners.reshape(-1)).reshape(4, -1)
        return torch.matmul(plan.mix, four).reshape(-1, channels)

    def table(self, source: Tensor, extras: Tensor, near: bool, exchange: str | None = None) -> Tensor:
        """`[3 * K + 3 * n + 1, C]`: sites, n ghosts for each phase, and zero for outside.

        source: `[cells, C]`, values at the cells; extras: `[3 * K, C]`.
        """
        exchange, parts = exchange or self.exchange, [extras]
        if exchange != "none":
            parts.append(self.ghosts(source, self._rows(near, exchange)[1], exchange))
        return torch.cat([*parts, source.new_zeros(1, int(source.shape[1]))])

    def _rows(self, near: bool, exchange: str | None = None) -> tuple[Tensor, Tensor | None]:
        """`[3 * outside + 1]`, the table's row for each number of `LevelPlan.neighbours`; cells of ghosts.

        The cells are None where all have ghosts, or none has.
        """
        kind = "near" if near else "none" if (exchange or self.exchange) == "none" else "all"
        if kind not in self._kinds:
            self._kinds[kind] = self._make_rows(kind)
        return self._kinds[kind]

    def _make_rows(self, kind: str) -> tuple[Tensor, Tensor | None]:
        plan, device, sites = self.plan, self.cells.device, 3 * self.count
        every = 3 * plan.outside + 1
        if kind == "all":
            rows, ghosts = torch.arange(sites, sites + every, device=device), None
        elif kind == "none":
            rows, ghosts = torch.full((every,), sites, device=device), None
        else:
            ghosts = self._near_cells()
            count = 3 * ghosts.shape[0]
            rows = torch.zeros(every, dtype=torch.int64, device=device) + (sites + count)
            rows = rows.scatter(0, self._of_phases(ghosts), torch.arange(sites, sites + count, device=device))
        return rows.scatter(0, self._of_phases(self.cells), torch.arange(sites, device=device)), ghosts

    def _of_phases(self, cells: Tensor) -> Tensor:
        """`[3 * n]`: the numbers of phases 1, 2, 3 of cells."""
        first = torch.arange(3, device=cells.device)[:, None] * self.plan.outside
        return (first + cells).reshape(-1)

    def _near_cells(self) -> Tensor:
        """`[n]`: cells without extra sites that near steps' taps read; n is known at run time only."""
        read = self.plan.around(self.near_steps).index_select(0, self.cells).reshape(-1)
        near = torch.zeros(self.plan.outside + 1, device=read.device).scatter(0, read, 1.0)
        near = near.scatter(0, self.cells, 0.0)
        return near[: self.plan.cells].nonzero().reshape(-1)


class Sites:
    """Features on mixed levels: a lattice and, by stride, coarsest first, the rows of extra sites."""

    def __init__(self, lattice: Lattice, extras: dict[int, Tensor], splits: dict[int, Split]) -> None:
        self.lattice, self.extras, self.splits = lattice, extras, splits
        self._values: dict[tuple[int, str | None], Tensor] = {}
        self._tables: dict[tuple[int, bool], Tensor] = {}

    def taps(self, stride: int, spacing: int) -> Tensor:
        """What nine taps, `spacing` px apart, read around the extra sites at `stride`: `[3 * K * 9, C]`."""
        split = self.splits[stride]
        if self.lattice.stride <= stride:
            return split.patch_taps(self.lattice.padded_rows, spacing // stride)
        step = spacing // (2 * stride)
        key = stride, split.is_near(step)
        if key not in self._tables:
            self._tables[key] = split.table(self.values(2 * stride), self.extras[stride], key[1])
        return self._tables[key].index_select(0, split.tap_rows(step))

    def own(self, stride: int) -> Tensor:
        """`[3 * K, C]`: the values at the extra sites themselves."""
        if self.lattice.stride <= stride:
            split = self.splits[stride]
            cells = split.plan.phase_cells[1:].index_select(1, split.cells)
            return self.lattice.padded_rows.index_select(0, cells.reshape(-1))
        return self.extras[stride]

    def values(self, stride: int, exchange: str | None = None) -> Tensor:
        """`[cells, C]`: values on the complete grid at `stride`, by the exchange rule where there is no
        site."""
        key = stride, exchange
        if stride == self.lattice.stride:
            return self.lattice.rows
        if key not in self._values:
            split = self.splits[stride]
            source = self.values(2 * stride, exchange)
            self._values[key] = split.complete(source, self.extras[stride], exchange or split.exchange)
        return self._values[key]
