"""The forms of a value: a complete grid, or a lattice with the rows of extra sites."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparse_seg.sites.plan import HERE, Taps

if TYPE_CHECKING:
    from sparse_seg.sites.level import Level
    from sparse_seg.sites.sites import Sites


class TapTable(NamedTuple):
    """Rows `[R, C]` that windows read; the last one, zero, is what lies outside the image.

    They are copies, so backward keeps `parts`, which other operators keep as well, and makes the rows again.
    """

    rows: Tensor
    make: Callable[..., Tensor]  # the rows, of the parts
    parts: tuple[Tensor, ...]


class Epilogue(NamedTuple):
    """What follows a convolution at M sites: rows `[M, O]` that are added, then bounds."""

    residual: Tensor | None = None
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, rows: Tensor) -> Tensor:
        """The same of rows that a convolution gave."""
        rows = rows if self.residual is None else rows + self.residual
        return rows if self[1:] == NOTHING[1:] else rows.clamp(self.low, self.high)


NOTHING = Epilogue()


class Grid:
    """A complete grid `[B, C, h, w]` at `stride` px."""

    def __init__(self, tensor: Tensor, stride: int) -> None:
        self.tensor, self.stride = tensor, stride
        self._rows: Tensor | None = None
        self._table: TapTable | None = None

    @property
    def rows(self) -> Tensor:
        """`[B * h * w, C]`."""
        if self._rows is None:  # not functools.cached_property: its lock is beyond torch.compile
            batch, *channels, height, width = map(int, self.tensor.shape)
            rank = self.tensor.ndim  # no negative axes, which the ONNX exporter would write as they are
            last = self.tensor.permute(0, rank - 2, rank - 1, *range(1, rank - 2))
            self._rows = last.reshape(batch * height * width, *channels)
        return self._rows

    @property
    def table(self) -> TapTable:
        """Rows and, behind them, zero."""
        if self._table is None:
            self._table = TapTable(_padded(self.rows), _padded_grid, (self.tensor,))
        return self._table

    def settle(self) -> None:
        """Drop what is made of the grid for those that read it: none does any more in this run."""
        self._table = None

    def at(self, level: Level) -> Tensor:
        """`[3 * run, C]`: the values at a level's extra sites that are run."""
        rows = self.rows if level.plan.is_even else self.table.rows
        return rows.index_select(0, level.grid_rows(HERE, self.stride))

    def thinned(self, stride: int) -> Tensor:
        """The values at the places of a larger stride alone."""
        step = stride // self.stride
        return self.tensor if step == 1 else self.tensor[..., ::step, ::step]


def rows_to_grid(rows: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
    """`[B * H * W, C]` to `[B, C, H, W]` in channels_last memory."""
    grid = rows.reshape(batch, *size, *map(int, rows.shape[1:]))
    return grid.permute(0, *range(3, grid.ndim), 1, 2)


class Mixed:
    """A value on mixed levels: a lattice and, by stride, coarsest first, the rows of extra sites.

    Args:
        lattice: its grid; None where nothing reads it any more.
        rows: `[3 * run, C]` of the extra sites that are run at each level below the lattice's.
        sites: where they stand.
        before: the same value for the sites of the step before; None: all sites are run.
    """

    def __init__(
        self, lattice: Grid | None, rows: dict[int, Tensor], sites: Sites, before: Mixed | None = None
    ) -> None:
        self._lattice, self.rows, self.sites = lattice, rows, sites
        self._extras: dict[int, Tensor] = {} if before is not None else rows
        self._before = before
        self._complete: dict[tuple[int, str], Tensor] = {}
        self._tables: dict[tuple[int, str], TapTable] = {}

    @property
    def lattice(self) -> Grid:
        assert self._lattice is not None
        return self._lattice

    def extras(self, stride: int) -> Tensor:
        """`[3 * K, C]`: rows of all extra sites at a stride, with those of the steps before."""
        if stride not in self._extras:
            assert self._before is not None
            parts = self._before.extras(stride), self.rows[stride]
            both = [part.reshape(3, -1, *part.shape[1:]) for part in parts]
            self._extras[stride] = torch.cat(both, 1).flatten(0, 1)
        return self._extras[stride]

    @property
    def whole(self) -> Mixed:
        """The value, with all extra sites as those that are run."""
        if self._before is None:
            return self
        return Mixed(self._lattice, {one: self.extras(one) for one in self.rows}, self.sites.whole)

    def reads(self, stride: int, taps: Taps) -> tuple[TapTable, Tensor, Tensor | None]:
        """What taps read around the extra sites at `stride` that are run: a table, and its rows
        `[3 * run * T]`; or rows `[3 * run * T, 4]` and their shares in what is read."""
        level, base, apart = self.sites.levels[stride], self.lattice.stride, self.sites.apart
        if base <= stride:
            rows = apart.in_grid(taps, stride, base, base) if apart else level.grid_rows(taps, base)
            return self.lattice.table, rows, None
        kind = level.kind(taps)
        kind = "base" if kind != "none" and level.sums_rows else kind
        if (stride, kind) not in self._tables:
            strides = [one for one in self.rows if one >= stride]  # finer ones are not read
            make = functools.partial(_made, self.sites, base, strides, stride, kind)
            parts = self.lattice.tensor, *map(self.extras, strides)
            self._tables[stride, kind] = TapTable(self._table(stride, kind), make, parts)
        if kind == "base":
            return self._tables[stride, kind], *level.tap_shares(taps)
        rows = apart.in_table(taps, stride) if apart else level.tap_rows(taps)
        return self._tables[stride, kind], rows, None

    def reads_apart(self, stride: int, taps: Taps) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same without a table that is made for it.

        Returns:
            Rows `[R, C]`; which of them taps read, `[3 * run * T]`; and the grid `[cells, C]` of which ghosts
            are made, if they are: R + n is then ghost n of all `3 * cells`, and zero comes behind.
        """
        level, base, apart = self.sites.levels[stride], self.lattice.stride, self.sites.apart
        if base <= stride:
            rows = apart.in_grid(taps, stride, base, base) if apart else level.grid_rows(taps, base)
            return self.lattice.rows, rows, None
        if level.exchange == "none":
            rows = apart.in_table(taps, stride) if apart else level.tap_rows(taps)
            return self.extras(stride), rows, None
        return self.extras(stride), level.tap_rows(taps, "all"), self.complete(2 * stride)

    def _table(self, stride: int, kind: str) -> Tensor:
        source = self.lattice.rows if kind == "none" else self.complete(2 * stride)
        return self.sites.levels[stride].table(source, self.extras(stride), kind)

    def own(self, stride: int) -> Tensor:
        """`[3 * run, C]`: the values at the extra sites at `stride` that are run."""
        if stride in self.rows:
            return self.rows[stride]
        return self.lattice.at(self.sites.levels[stride])

    def complete(self, stride: int, exchange: str | None = None) -> Tensor:
        """`[cells, C]`: values on the complete grid at `stride`, by the exchange rule (of the sites) where
        there is no site."""
        if stride == self.lattice.stride:
            return self.lattice.rows
        exchange = exchange or self.sites.exchange
        if (stride, exchange) not in self._complete:
            level, source = self.sites.levels[stride], self.complete(2 * stride, exchange)
            self._complete[stride, exchange] = level.complete(source, self.extras(stride), exchange)
        return self._complete[stride, exchange]

    def settle(self) -> None:
        """Drop what is made of the value for those that read it: none does any more in this run."""
        self._complete.clear()
        self._tables.clear()
        if self._lattice is not None:
            self._lattice.settle()

    def densify(self, exchange: str = "linear", stride: int = 0) -> Grid:
        """The finest grid, by the exchange rule where there is no site; none finer than `stride` px."""
        finest = max(stride, min([self.lattice.stride, *self.rows]))
        if finest >= self.lattice.stride:
            return self.lattice
        plan = self.sites.levels[finest].plan
        return Grid(rows_to_grid(self.complete(finest, exchange), plan.batch, plan.fine), finest)

    def mean_by_area(self) -> Tensor:
        """`[B, C, 1, 1]`: the mean of all sites, each as often as the cells of the finest grid that it stands
        for.

        Splitting a cell takes three quarters of its area from its own site and gives them to the extra ones.
        """
        grid = self.lattice.tensor
        if not self.rows:
            return grid.mean((2, 3), keepdim=True)
        batch, channels, height, width = map(int, grid.shape)
        levels = len(self.rows)
        precise = torch.promote_types(grid.dtype, torch.float32)
        total = grid.sum((2, 3), dtype=precise) * 4**levels
        count = total.new_full((batch, 1), height * width * 4**levels)
        for number, stride in enumerate(self.rows, start=1):
            level, weight = self.sites.levels[stride], 4 ** (levels - number)
            source = self.complete(2 * stride).index_select(0, level.cells)
            there = level.plan.inside.reshape(3, -1).index_select(1, level.cells)
            inside, extras = there.to(precise), self.extras(stride).reshape(3, level.count, channels)
            new = extras.masked_fill(~there[:, :, None], 0).sum(0)  # beyond the border they may be infinite
            gain = level.by_image((new - 3 * source).to(precise))
            total = total + weight * gain
            count = count + weight * level.by_image(inside.sum(0)[:, None] - 3)
        return (total / count).to(grid.dtype)[:, :, None, None]


def _padded(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(1, *map(int, rows.shape[1:]))])


def _padded_grid(tensor: Tensor) -> Tensor:
    return _padded(Grid(tensor, 1).rows)


def _made(
    sites: Sites, base: int, strides: list[int], stride: int, kind: str, lattice: Tensor, *extras: Tensor
) -> Tensor:
    """The rows of a table of `Mixed.reads`, of its lattice at `base` px and its extra sites at `strides`."""
    rows = dict(zip(strides, extras, strict=True))
    return Mixed(Grid(lattice, base), rows, sites)._table(stride, kind)
