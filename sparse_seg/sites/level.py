"""A level's split cells, and what their extra sites read.

Rows of extra sites are `[3 * K, C]`, phase by phase; K is the number of split cells in all images. Every
shape follows from K, but for the number of *ghosts* (values where a neighbour has no site): near taps have
those of the cells that some extra site reads, far taps those of all cells.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.sites.plan import LevelPlan, Taps

SEPARATE = "separate"  # `none`, and levels do not read each other, see `apart.py`
EXCHANGES = ("linear", "nearest", "none", SEPARATE)

T = TypeVar("T")


class Level:
    """Split cells of a level.

    Args:
        plan: the level's constants.
        cells: `[K]` int64, the cells that have extra sites.
        exchange: what a neighbour without a site reads: `linear`, the bilinear interpolation of the grid at
            twice the stride; `nearest`, the cell's own site; `none`, zero.
        near: taps that share ghosts made for near cells only.
        new: how many of the cells, the last ones, are run; None: all.
        counts: bool `[K]`, which of the cells are there for the first time; None: all. Others make the same
            rows again.
    """

    def __init__(
        self,
        plan: LevelPlan,
        cells: Tensor,
        exchange: str = "linear",
        near: Sequence[Taps] = (),
        new: int | None = None,
        counts: Tensor | None = None,
    ) -> None:
        self.plan, self.cells, self.exchange = plan, cells, exchange
        self.count = int(cells.shape[0])
        self.run = self.count if new is None else new
        self.run_cells = cells if new is None else cells[self.count - new :]
        self.counts = counts
        self.near = tuple(near) if exchange != "none" else ()
        self._kept: dict[Hashable, Any] = {}

    def kind(self, taps: Taps) -> str:
        """Which table the taps read: that with `near` ghosts, with those of `all` cells, or with `none`."""
        return "none" if self.exchange == "none" else "near" if taps in self.near else "all"

    def tap_rows(self, taps: Taps, kind: str = "") -> Tensor:
        """`[3 * run * T]`: the rows of `table` that taps read around the extra sites that are run.

        kind: the table's; "": that of `kind`.
        """
        kind = kind or self.kind(taps)

        def build() -> Tensor:
            read = self.plan.around_sites(taps).index_select(1, self.run_cells).reshape(-1)
            return self._numbering(kind)[0].index_select(0, read)

        return self.cached(("table", taps, kind), build)

    def grid_rows(self, taps: Taps, stride: int) -> Tensor:
        """`[3 * run * T]`: what taps read in a complete grid, as `LevelPlan.in_grid`."""

        def build() -> Tensor:
            return self.plan.in_grid(taps, stride).index_select(1, self.run_cells).reshape(-1)

        return self.cached(("grid", taps, stride), build)

    def places(self, taps: Taps, stride: int, source: int) -> Tensor:
        """`[K * n * T]`: what taps read in a complete grid at `source` px around the n places at `stride` px
        of each split cell, as `LevelPlan.taps_at`."""

        def build() -> Tensor:
            return self.plan.taps_at(taps, stride, source).index_select(0, self.cells).reshape(-1)

        return self.cached(("places", taps, stride, source), build)

    def table(self, source: Tensor, extras: Tensor, kind: str) -> Tensor:
        """`[3 * K + 3 * n + 1, C]`: sites, n ghosts for each phase, and zero for outside; of kind `base` the
        source in place of ghosts, before the sites: `[cells + 3 * K + 1, C]`.

        source: `[cells, C]`, values of the complete grid at twice the stride; extras: `[3 * K, C]`.
        """
        parts = [source, extras] if kind == "base" else [extras]
        if kind in ("near", "all"):
            parts.append(self.ghosts(source, self._numbering(kind)[1], self.exchange))
        return torch.cat([*parts, source.new_zeros(1, int(source.shape[1]))])

    def tap_shares(self, taps: Taps) -> tuple[Tensor, Tensor]:
        """`[3 * run * T, 4]` twice: rows of the table of kind `base`, and their shares in what taps read
        around the extra sites that are run."""

        def build() -> tuple[Tensor, Tensor]:
            read = self.plan.around_sites(taps).index_select(1, self.run_cells).reshape(-1)
            return self._taken(self.exchange, read + self.plan.cells)  # those are numbered from phase 1 on

        return self.cached(("shares", taps), build)

    @property
    def sums_rows(self) -> bool:
        """Whether values where there is no site are summed as they are read, in place of being made once: on
        the CPU, without gradients, in no graph."""
        in_graph = self.plan.in_graph or torch.jit.is_tracing() or torch.compiler.is_compiling()
        return self.plan.device.type == "cpu" and not (torch.is_grad_enabled() or in_graph)

    def complete(self, source: Tensor, extras: Tensor, exchange: str = "linear") -> Tensor:
        """Values of the level's own grid, all of its cells: `[fine cells, C]`."""
        if self.sums_rows:
            places = self.plan.phases_of_fine
            rows, shares = self.cached(("fine", exchange), lambda: self._taken(exchange, places))
            return sum_rows(self.table(source, extras, "base"), rows, shares)
        if exchange == "none":
            ghosts = source.new_zeros(3 * self.plan.cells, int(source.shape[1]))
        else:
            ghosts = self.ghosts(source, None, exchange)
        return torch.cat([source, extras, ghosts]).index_select(0, self._places())

    def ghosts(self, source: Tensor, cells: Tensor | None, exchange: str) -> Tensor:
        """`[3 * n, C]`: phases 1, 2, 3 of cells (None: of all) as if they had no site."""
        channels, corners = int(source.shape[1]), self.plan.corners
        if cells is not None:
            corners = corners.index_select(1, cells)
        if exchange == "nearest":
            return source.index_select(0, corners[0]).repeat(3, 1)
        four = source.index_select(0, corners.reshape(-1)).reshape(4, -1)
        return torch.matmul(self.plan.mix(source.dtype), four).reshape(-1, channels)

    @property
    def valid(self) -> Tensor | None:
        """`[n]`: which of the `3 * run` rows lie inside the image; None where all do."""
        if self.plan.is_even:
            return None
        inside = self.plan.inside
        return self.cached("valid", lambda: inside[:, self.run_cells].reshape(-1).nonzero().reshape(-1))

    @property
    def num_run(self) -> int:
        """How many extra sites are run."""
        return 3 * self.run if self.valid is None else int(self.valid.shape[0])

    def by_image(self, values: Tensor) -> Tensor:
        """Sums `[B, C]` over each image's cells, each once, of values `[K, C]`."""
        batch = self.plan.batch
        if self.counts is not None:
            values = values.masked_fill(~self.counts[:, None], 0)
        if batch == 1:
            return values.sum(0, keepdim=True)
        image = self.cells // (self.plan.cells // batch)
        sums = values.new_zeros(batch, int(values.shape[1]))
        return sums.scatter_add(0, image[:, None].expand_as(values), values)  # ONNX has no index_add

    def image_of_row(self) -> Tensor:
        """`[3 * run]`: which image of the batch an extra site belongs to."""
        each = self.plan.cells // self.plan.batch
        return self.cached("image", lambda: (self.run_cells // each).repeat(3))

    def cached(self, key: Hashable, build: Callable[[], T]) -> T:
        """What is derived from the level, built at the first call with `key` and kept with it."""
        if key not in self._kept:
            self._kept[key] = build()
        return self._kept[key]

    def _taken(self, exchange: str, places: Tensor) -> tuple[Tensor, Tensor]:
        """`[N, 4]` twice: rows of the table of kind `base`, and their shares in the values at places
        `phase * cells + cell`."""

        def build() -> tuple[Tensor, Tensor]:
            rows, shares = self.plan.shares(exchange)
            cells, zero = self.plan.cells, self.plan.cells + 3 * self.count
            sites = self._numbers() + cells
            own = F.pad(torch.arange(cells, zero, device=sites.device)[:, None], (0, 3), value=zero)
            rows = rows.masked_fill(rows == cells, zero).index_copy(0, sites, own)
            return rows, shares.index_copy(0, sites, shares[:1].expand(len(sites), 4))

        rows, shares = self.cached(("shares", exchange), build)
        return rows.index_select(0, places), shares.index_select(0, places)

    def _places(self) -> Tensor:
        """`[fine cells]`: the row of each place among those of the source, the extra sites, all ghosts."""

        def build() -> Tensor:
            cells, sites, device = self.plan.cells, 3 * self.count, self.cells.device
            first = torch.arange(cells, device=device)
            rows = torch.cat([first, torch.arange(3 * cells, device=device) + (cells + sites)])
            if sites:  # OpenVINO reads no scatter of nothing
                places = torch.arange(cells, cells + sites, device=device)
                rows = rows.scatter(0, self._numbers() + cells, places)
            return rows.index_select(0, self.plan.phases_of_fine)

        return self.cached("places", build)

    def _numbering(self, kind: str) -> tuple[Tensor, Tensor | None]:
        """`[3 * cells + 1]`, the table's row for each number of `LevelPlan.around_sites`; cells of ghosts.

        The cells are None where all have ghosts, or none has.
        """
        return self.cached(kind, lambda: self._numbered(kind))

    def _numbered(self, kind: str) -> tuple[Tensor, Tensor | None]:
        device, sites, every = self.cells.device, 3 * self.count, 3 * self.plan.cells + 1
        if kind == "all":
            rows, ghosts = torch.arange(sites, sites + every, device=device), None
        elif kind == "none":
            rows, ghosts = torch.full((every,), sites, device=device), None
        else:
            ghosts = self.rim(self.near)
            count = 3 * ghosts.shape[0]
            rows = torch.zeros(every, dtype=torch.int64, device=device) + (sites + count)
            numbers = self._numbers(ghosts)
            rows = rows.scatter(0, numbers, torch.arange(sites, sites + count, device=device))
        return rows.scatter(0, self._numbers(), torch.arange(sites, device=device)), ghosts

    def _numbers(self, cells: Tensor | None = None) -> Tensor:
        """`[3 * n]`: the numbers of phases 1, 2, 3 of cells."""
        cells = self.cells if cells is None else cells
        first = torch.arange(3, device=cells.device)[:, None] * self.plan.cells
        return (first + cells).reshape(-1)

    def rim(self, windows: Sequence[Taps]) -> Tensor:
        """`[n]`: cells without extra sites that windows' taps read; n is known at run time only."""
        tables = [self.plan.around_cells(taps).index_select(0, self.run_cells) for taps in windows]
        read = torch.cat(tables, 1).reshape(-1)
        near = torch.zeros(self.plan.cells + 1, device=read.device).scatter(0, read, 1.0)
        near = near.scatter(0, self.cells, 0.0)
        return near[: self.plan.cells].nonzero().reshape(-1)


def sum_rows(table: Tensor, rows: Tensor, shares: Tensor) -> Tensor:
    """`[N, C]`: sums of rows `[N, k]` of a table by their shares."""
    return F.embedding_bag(rows, table, per_sample_weights=shares.to(table.dtype), mode="sum")
