"""Merge `patch`: late values are computed in split blocks alone.

Coarse blocks keep what the coarse pass gave, late values and logits, so a decoder at stride 4 is not run
twice everywhere. Level by level, from the coarsest: in the blocks that a level splits, each late value has
all the places that it has where the network runs dense at the level's stride. A window there reads those
of split blocks, and outside them what the level before gave. So all coarse is the dense coarse network, all
fine the dense fine one, and all blocks in the middle the dense one there.

In training, norms behind the rows take their statistics of all values that are computed at once, those of
the coarse grid and of each level's places, and update the running ones once; as norms on rows do of all
sites. The coarse values are then made of the lattices of the same run: a coarse pass of its own would pull
the running statistics towards coarse. Dropout drops each of these values by itself, as it does on rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_seg.errors import SparseSegError
from sparse_seg.graph import Geometry
from sparse_seg.ops import OPERATORS, Node, Reads, Spatial
from sparse_seg.run.values import Interpreter
from sparse_seg.sites import HERE, Grid, Level, Mixed, Sites, grid_size, plan_of, rows_to_grid


def check_patch(geometry: Geometry) -> None:
    """Raises a SparseSegError, of one line, where late values cannot be computed in split blocks alone."""
    if not geometry.refines:
        raise SparseSegError(
            f"{geometry.where_mixing} makes the coarse pass depend on the mask; choose merge whole"
        )
    cells, block = geometry.cells(geometry.strides[0]), 2 * geometry.strides[0]
    for node in geometry.graph.nodes:
        on_late = any(geometry.kind[name] == "late" for name in node.inputs)
        pools = OPERATORS[node.op].is_pool and on_late
        late = geometry.kind[node.name] == "late"
        if pools or (late and OPERATORS[node.op].needs_grid and node.op != "resize"):
            raise SparseSegError(f"{node.where} reads whole images behind the rows; choose merge whole")
        if late and cells[node.name] > block:
            raise SparseSegError(
                f"{node.where} writes places {cells[node.name]} px apart behind the rows, more than a block "
                f"of {block} px; choose merge whole"
            )


class Patches:
    """A late value: a grid of the level before, and rows of all places in split blocks.

    Args:
        before: the value at the level before, at `stride` or twice that; None where nothing reads it.
        rows: `[K * n, C]`, of the n places of each split cell.
        stride: of those places, px.
    """

    def __init__(self, before: Grid | Patches | None, rows: Tensor, stride: int, level: Level) -> None:
        self.rows, self.stride, self.level = rows, stride, level
        self._before = before
        self._table: Tensor | None = None

    @property
    def table(self) -> Tensor:
        """Rows of the grid at `stride`, those of the split blocks' places, and zero."""
        if self._table is None:
            assert self._before is not None
            base = self._before.complete() if isinstance(self._before, Patches) else self._before
            if base.stride != self.stride:
                base = _doubled(base, self.level, self.stride)
            self._table = torch.cat([base.rows, self.rows, self.rows.new_zeros(1, int(self.rows.shape[1]))])
        return self._table

    @property
    def numbers(self) -> Tensor:
        """`[places + 1]`: the row of the table of each place, and of outside."""

        def build() -> Tensor:
            cells = self.level.places(HERE, self.stride, self.stride)
            places, count = self.level.plan.number(self.stride), int(cells.shape[0])
            rows = torch.arange(places + 1, device=cells.device)
            rows = rows.scatter(0, cells, torch.arange(places, places + count, device=cells.device))
            outside = torch.full((1,), places + count, device=cells.device, dtype=rows.dtype)
            return torch.cat([rows[:-1], outside])

        return self.level.cached(("numbers", self.stride), build)

    def complete(self) -> Grid:
        """The whole grid."""
        plan, rows = self.level.plan, self.table.index_select(0, self.numbers[:-1])
        return Grid(rows_to_grid(rows, plan.batch, grid_size(plan.image, self.stride)), self.stride)


def _doubled(grid: Grid, level: Level, stride: int) -> Grid:
    """A grid interpolated to half its stride, as densify does."""
    plan = level.plan
    if stride != plan.stride:
        plan = plan_of(plan.batch, plan.image, stride, plan.device)
    none = grid.tensor.new_zeros(0, int(grid.tensor.shape[1]))
    rows = Level(plan, level.cells[:0]).complete(grid.rows, none)
    return Grid(rows_to_grid(rows, plan.batch, plan.fine), stride)


def _inside(level: Level, stride: int) -> Tensor | None:
    """`[m]`: which of a level's places at a stride lie inside the image; None where all do."""
    plan = level.plan
    if all(length % (2 * plan.stride) == 0 for length in plan.image):
        return None
    places = level.places(HERE, stride, stride)
    return level.cached(("inside", stride), lambda: (places < plan.number(stride)).nonzero().squeeze(1))


def patched(
    run: Interpreter, sites: Sites, coarse: Mapping[str, Any] | None, values: Mapping[str, Any]
) -> Grid:
    """The grid of logits at the finest stride.

    Args:
        coarse: of the coarse pass, with `Geometry.kept_late`; None in training: made of `values`.
        values: early values, vectors and rows of the mixed run.
    """
    geometry = run.geometry
    levels = list(sites.levels.values())
    known: dict[str, list[Any]] = {}  # the forms of a value, one for each stride, coarsest first

    def forms(name: str) -> list[Any]:
        if name not in known:
            value, strides = values[name], geometry.strides[::-1]
            is_mixed = isinstance(value, Mixed)
            known[name] = [value.densify(stride=one) if is_mixed else value for one in strides]
        return known[name]

    late = geometry.of_kind("late")
    left = Counter([geometry.graph.output, *(name for node in late for name in node.inputs)])
    for node in late:
        read = list(zip(*map(forms, node.inputs), strict=True))
        known[node.name] = _late(run, levels, node, read, coarse)
        left.subtract(node.inputs)
        for name in node.inputs:
            if not left[name]:  # grids at stride 4 are large
                known.pop(name, None)
    output = forms(geometry.graph.output)[-1]
    return output.complete() if isinstance(output, Patches) else output


def _late(
    run: Interpreter,
    levels: Sequence[Level],
    node: Node,
    read: Sequence[Any],
    coarse: Mapping[str, Any] | None,
) -> list[Any]:
    """A node's value: its grid at the coarsest stride, if known, and its patches at each level."""
    if run.trains(node) and OPERATORS[node.op].joins:
        return _joined(run, levels, node, [value for (value,) in read])
    forms: list[Any] = [run.dense_node(node, read[0]) if coarse is None else coarse.get(node.name)]
    for level, inputs in zip(levels, read[1:], strict=True):
        stride = run.geometry.cells(level.plan.stride)[node.name]
        rows = _computed(run, level, node, inputs, stride)
        if run.count is not None:
            inside = _inside(level, stride)
            run.counted(node, int(rows.shape[0] if inside is None else inside.shape[0]))
        forms.append(Patches(forms[-1], rows, stride, level))
    return forms


def _joined(run: Interpreter, levels: Sequence[Level], node: Node, read: Sequence[Any]) -> list[Any]:
    """A node whose statistics are those of all values at once, see above."""
    grid, *patches = read
    inside = [_inside(level, one.stride) for level, one in zip(levels, patches, strict=True)]
    first, *rest = run.joined(node, [one.rows for one in read], [None, *inside])
    size = grid_size(run.size, grid.stride)
    forms: list[Any] = [Grid(rows_to_grid(first, run.batch, size), grid.stride)]
    for level, one, rows in zip(levels, patches, rest, strict=True):
        forms.append(Patches(forms[-1], rows, one.stride, level))
    return forms


def _computed(run: Interpreter, level: Level, node: Node, read: Sequence[Any], stride: int) -> Tensor:
    """`[K * n, C]`: a node at the places of split blocks."""
    operator, tensors = OPERATORS[node.op], run.tensors_of(node)
    if node.op == "resize":
        return _resized(run, level, node, read[0], stride)
    if node.name in run.taps and isinstance(operator, Spatial):
        taps = run.dilated(node, read[0].stride)
        table, index = _table(read[0], level.places(taps, stride, read[0].stride))
        return operator.rows(node, tensors, Reads(table, index, taps.number))
    return operator.apply(node, tensors, [_rows(level, one, stride) for one in read], False)


def _table(value: Grid | Patches, places: Tensor) -> tuple[Tensor, Tensor]:
    """A table of a value's places, and the rows in it of flat places at the value's stride."""
    if isinstance(value, Patches):
        return value.table, value.numbers.index_select(0, places)
    return value.table.rows, places


def _rows(level: Level, value: Any, stride: int) -> Tensor:
    """A value at the split blocks' places."""
    if isinstance(value, Patches) and value.stride == stride:
        return value.rows
    if not isinstance(value, Tensor):
        table, index = _table(value, level.places(HERE, stride, value.stride))
        return table.index_select(0, index)
    vectors = value.reshape(*map(int, value.shape[:-2]))
    if vectors.shape[0] == 1:
        return vectors
    per_image = level.plan.cells // level.plan.batch
    each = int(level.places(HERE, stride, stride).shape[0]) // max(level.count, 1)
    return vectors.index_select(0, (level.cells // per_image).repeat_interleave(each))


def _resized(run: Interpreter, level: Level, node: Node, value: Any, stride: int) -> Tensor:
    """Bilinear, from the four places around each; others, which compute little, on the whole grid."""
    if isinstance(value, Tensor):
        return _rows(level, value, stride)
    if not run.lies_between(node, value.stride, stride):
        whole = value.complete() if isinstance(value, Patches) else value
        return _rows(level, run.resize(node, whole, stride), stride)
    down, across = run.shares(node, value.stride, stride)
    (height, width), (rows, columns) = grid_size(run.size, stride), grid_size(run.size, value.stride)
    cells = level.places(HERE, stride, stride)
    inside = cells < run.batch * height * width
    image, y, x = cells // (height * width), cells // width % height, cells % width
    total: Any = 0
    for row, row_share in ((down[0], 1 - down[2]), (down[1], down[2])):
        for column, column_share in ((across[0], 1 - across[2]), (across[1], across[2])):
            place = (image * rows + row.index_select(0, y)) * columns + column.index_select(0, x)
            place = place.where(inside, run.batch * rows * columns)
            table, index = _table(value, place)
            share = row_share.index_select(0, y) * column_share.index_select(0, x)
            total = total + table.index_select(0, index) * share.to(table.dtype)[:, None]
    return total
