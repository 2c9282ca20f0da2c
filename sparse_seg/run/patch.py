"""Merge `patch` of a captured network: late values are computed in fine blocks alone.

Coarse blocks keep what the coarse pass gave, late values and logits, so a decoder at stride 4 is not run
twice everywhere. In a fine block each late value has all its places. A window there reads those of fine
blocks, and outside them what the coarse pass gave. All coarse is the dense coarse network, all fine the
dense fine one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_seg.errors import SparseSegError
from sparse_seg.graph import Geometry
from sparse_seg.ops import OPERATORS, Node, Reads, Spatial
from sparse_seg.run.values import Run, Values
from sparse_seg.sites import HERE, Grid, Level, Mixed, Taps, grid_size, rows_to_grid


def check_patch(geometry: Geometry) -> None:
    """Raises a SparseSegError, of one line, where late values cannot be computed in fine blocks alone."""
    if len(geometry.strides) != 2:
        raise SparseSegError("merge patch of a captured network needs two strides; choose merge whole")
    if not geometry.refines:
        raise SparseSegError(
            f"{geometry.where_mixing} makes the coarse pass depend on the mask; choose merge whole"
        )
    for node in geometry.graph.nodes:
        on_late = any(geometry.kind[name] == "late" for name in node.inputs)
        pools = OPERATORS[node.op].is_pool and on_late
        if pools or (
            geometry.kind[node.name] == "late" and OPERATORS[node.op].needs_grid and node.op != "resize"
        ):
            raise SparseSegError(f"{node.where} reads whole images behind the rows; choose merge whole")


class Patches:
    """A late value: a grid of the coarse pass, and rows of all places in fine blocks.

    Args:
        coarse: the grid, at `stride` or twice that; None where nothing reads it.
        rows: `[K * n, C]`, of the n places of each fine block.
        stride: of those places, px.
    """

    def __init__(self, coarse: Grid | None, rows: Tensor, stride: int, fine: Fine) -> None:
        self.rows, self.stride, self.fine = rows, stride, fine
        self._base = coarse
        self._table: Tensor | None = None

    @property
    def table(self) -> Tensor:
        """Rows of the grid at `stride`, those of the fine blocks' places, and zero."""
        if self._table is None:
            base = self._base
            assert base is not None
            if base.stride != self.stride:
                base = self.fine.doubled(base, self.stride)
            self._table = torch.cat([base.rows, self.rows, self.rows.new_zeros(1, int(self.rows.shape[1]))])
        return self._table

    def complete(self) -> Grid:
        """The whole grid."""
        size = grid_size(self.fine.run.size, self.stride)
        places = self.fine.numbers(self.stride)[:-1]
        return Grid(rows_to_grid(self.table.index_select(0, places), self.fine.run.batch, size), self.stride)


class Fine:
    """The places of the fine blocks of a run.

    Args:
        level: whose cells are the fine blocks.
    """

    def __init__(self, run: Run, level: Level) -> None:
        self.run, self.level, self.plan = run, level, level.plan
        self._kept: dict[Any, Tensor] = {}

    def cells(self, stride: int) -> Tensor:
        """`[K * n]`: flat places at a stride; the number of all places where one lies outside the image."""
        return self._chosen(("cells", stride), self.plan.cells_at(stride))

    def reads(self, taps: Taps, stride: int, source: int) -> Tensor:
        """`[K * n * T]`: the flat places at `source` px that taps read around those at `stride` px."""
        return self._chosen((taps, stride, source), self.plan.taps_at(taps, stride, source))

    def numbers(self, stride: int) -> Tensor:
        """`[places + 1]`: the row of `Patches.table` of each place at a stride, and of outside."""
        if ("numbers", stride) not in self._kept:
            height, width = grid_size(self.run.size, stride)
            places, cells = self.run.batch * height * width, self.cells(stride)
            count = int(cells.shape[0])
            rows = torch.arange(places + 1, device=cells.device)
            rows = rows.scatter(0, cells, torch.arange(places, places + count, device=cells.device))
            outside = torch.full((1,), places + count, device=cells.device, dtype=rows.dtype)
            self._kept["numbers", stride] = torch.cat([rows[:-1], outside])
        return self._kept["numbers", stride]

    def doubled(self, grid: Grid, stride: int) -> Grid:
        """A grid interpolated to half its stride, as densify does."""
        none = grid.tensor.new_zeros(0, int(grid.tensor.shape[1]))
        empty = Level(self.plan, self.level.cells[:0])
        rows = empty.complete(grid.rows, none)
        return Grid(rows_to_grid(rows, self.plan.batch, self.plan.fine), stride)

    def _chosen(self, key: Any, table: Tensor) -> Tensor:
        if key not in self._kept:
            self._kept[key] = table.index_select(0, self.level.cells).reshape(-1)
        return self._kept[key]


def patched(run: Run, level: Level, coarse: Mapping[str, Any], values: Mapping[str, Any]) -> Grid:
    """The grid of logits at the finest stride.

    Args:
        level: whose cells are the fine blocks.
        coarse: of the coarse pass, with `Geometry.kept_late`.
        values: early values, vectors and rows of the mixed run.
    """
    geometry, fine = run.geometry, Fine(run, level)
    cells, known = geometry.cells(geometry.strides[0]), Values(values)
    for node in geometry.graph.nodes:
        if geometry.kind[node.name] != "late":
            continue
        read = [known[name] for name in node.inputs]
        read = [one.densify() if isinstance(one, Mixed) else one for one in read]
        known[node.name] = _late(run, fine, node, read, cells[node.name], coarse.get(node.name))
    output = known[geometry.graph.output]
    if isinstance(output, Patches):
        return output.complete()
    return output.densify() if isinstance(output, Mixed) else output  # nothing is late


def _late(run: Run, fine: Fine, node: Node, read: list[Any], stride: int, coarse: Grid | None) -> Patches:
    operator = OPERATORS[node.op]
    tensors = run.tensors_of(node)
    if node.op == "resize":
        rows = _resized(run, fine, node, read[0], stride)
    elif node.name in run.taps and isinstance(operator, Spatial):
        table, index, taps = _window(run, fine, node, read[0], stride)
        rows = operator.rows(node, tensors, Reads(table, index, taps.number))
    else:
        rows = operator.apply(node, tensors, [_rows(fine, one, stride) for one in read], False)
    run.counted(node, int(rows.shape[0]))
    return Patches(coarse, rows, stride, fine)


def _source(fine: Fine, value: Any) -> tuple[Tensor, int, Tensor | None]:
    """A table of a value's places, its stride, and the rows of places in it (None: as they are numbered)."""
    if isinstance(value, Patches):
        return value.table, value.stride, fine.numbers(value.stride)
    return value.padded_rows, value.stride, None


def _window(run: Run, fine: Fine, node: Node, value: Any, stride: int) -> tuple[Tensor, Tensor, Taps]:
    table, source, numbers = _source(fine, value)
    taps = run.dilated(node, source)
    index = fine.reads(taps, stride, source)
    return table, index if numbers is None else numbers.index_select(0, index), taps


def _rows(fine: Fine, value: Any, stride: int) -> Tensor:
    """A value at the fine blocks' places."""
    if isinstance(value, Patches) and value.stride == stride:
        return value.rows
    if not isinstance(value, Tensor):
        table, source, numbers = _source(fine, value)
        index = fine.reads(HERE, stride, source)
        return table.index_select(0, index if numbers is None else numbers.index_select(0, index))
    vectors = value.reshape(*map(int, value.shape[:-2]))
    if vectors.shape[0] == 1:
        return vectors
    per_image = fine.plan.cells // fine.plan.batch
    count = int(fine.cells(stride).shape[0]) // fine.level.count if fine.level.count else 0
    return vectors.index_select(0, (fine.level.cells // per_image).repeat_interleave(count))


def _resized(run: Run, fine: Fine, node: Node, value: Any, stride: int) -> Tensor:
    """Bilinear, from the four places around each."""
    if isinstance(value, Tensor):
        return _rows(fine, value, stride)
    table, source, numbers = _source(fine, value)
    down, across = run.shares(node, source, stride)
    (height, width), (rows, columns) = grid_size(run.size, stride), grid_size(run.size, source)
    cells = fine.cells(stride)
    inside = cells < run.batch * height * width
    image, y, x = cells // (height * width), cells // width % height, cells % width
    total: Any = 0
    for row, row_share in ((down[0], 1 - down[2]), (down[1], down[2])):
        for column, column_share in ((across[0], 1 - across[2]), (across[1], across[2])):
            place = (image * rows + row.index_select(0, y)) * columns + column.index_select(0, x)
            place = place.where(inside, run.batch * rows * columns)
            index = place if numbers is None else numbers.index_select(0, place)
            share = row_share.index_select(0, y) * column_share.index_select(0, x)
            total = total + table.index_select(0, index) * share.to(table.dtype)[:, None]
    return total
