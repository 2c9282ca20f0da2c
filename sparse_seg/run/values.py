"""The values of a graph for a batch of images, each on the form of its part (`graph/geometry.py`).

A dense run at the coarsest stride computes all lattices, for they do not depend on the mask (P1 of
docs/method.md); a mixed run adds the rows of extra sites, and what depends on them. Early values are shared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.graph import Geometry
from sparse_seg.graph.rewrite import FUSED
from sparse_seg.ops import OPERATORS, Node, Spatial
from sparse_seg.ops.upsample import at_least_float32, axis_shares, upsample_logits
from sparse_seg.run.side_stream import SideStream
from sparse_seg.run.windows import Windows, fuses
from sparse_seg.sites import Grid, Level, Mixed, Sites, grid_size, rows_to_grid
from sparse_seg.sites.values import Epilogue

Value = Any  # a Grid, a Mixed, or a tensor: a vector of each image `[B, C, 1, 1]`
Values = dict[str, Value]


class Interpreter(Windows):
    """Runs a graph over images.

    Args:
        geometry: of the graph.
        tensors: by the graph's names.
        images: `[B, 3, H, W]`.
        training: how norms and dropout behave, but for
        frozen: names of those in eval mode.
        side: where mixed runs are, beside the dense one before them; None: behind it.
        count: told of each node that ran, and at how many places.
    """

    def __init__(
        self,
        geometry: Geometry,
        tensors: Mapping[str, Tensor],
        images: Tensor,
        training: bool = False,
        count: Callable[[Node, int], None] | None = None,
        frozen: Collection[str] = (),
        side: SideStream | None = None,
    ) -> None:
        super().__init__(geometry, tensors, (int(images.shape[2]), int(images.shape[3])), count)
        self.images, self.batch = images, int(images.shape[0])
        self.training, self.frozen, self.side = training, frozen, side
        self._shared: set[str] = set()  # values that a run must not overwrite
        self._early: Values | None = None
        self._stored = False  # whether they are kept in another dtype

    def early(self) -> Values:
        """The early values that others read."""
        if self._early is None:
            nodes = [node for node in self.geometry.graph.nodes if node.name in self.geometry.first]
            cells = self.geometry.cells(self.geometry.strides[0])
            values: Values = {}
            self._run(nodes, values, self.geometry.entries, lambda node, read: self._dense(node, read, cells))
            self._early = values
        if self._stored:
            return {name: self._restored(value) for name, value in self._early.items()}
        return self._early

    def store(self, dtype: torch.dtype) -> None:
        """Keep the early grids, but for the images, in a smaller dtype."""
        images = self.geometry.graph.nodes[0].name
        self._early = {
            name: Grid(value.tensor.to(dtype), value.stride)
            if isinstance(value, Grid) and name != images
            else value
            for name, value in self.early().items()
        }
        self._stored = True

    @property
    def kept_early(self) -> list[Value]:
        """As they are kept, without the images."""
        images = self.geometry.graph.nodes[0].name
        return [value for name, value in (self._early or {}).items() if name != images]

    def dense(self, stride: int, kept: Collection[str] = (), late: bool = True) -> Values:
        """Run dense at an output stride, px: grids and vectors.

        Args:
            kept: names of values that are wanted beside the output.
            late: whether late values are computed.
        """
        cells = self.geometry.cells(stride)
        hidden = self.geometry.first - self.geometry.entries
        # early values stand where they do in each such run; of those, `early` keeps what others read
        shares = stride >= self.geometry.strides[0] and hidden.isdisjoint(kept)
        nodes = self._later(late) if shares else self.geometry.graph.nodes
        values = dict(self.early()) if shares else {}
        return self._run(nodes, values, kept, lambda node, read: self._dense(node, read, cells))

    def mixed(
        self,
        sites: Sites,
        coarse: Values | None = None,
        before: Values | None = None,
        late: bool = True,
        wanted: Collection[str] = (),
        last: bool = False,
    ) -> Values:
        """Run under a mask: rows on mixed levels, what is late on grids at the finest stride.

        Args:
            late: whether late values are computed.
            coarse: what `dense` gave at the coarsest stride, with `Geometry.kept_lattices`; no lattice in it
                is computed again.
            before: what this method gave for the sites of the step before.
            wanted: names of values that are kept beside those that a later run reads.
            last: whether none reads this one's: then those are kept that losses and late values read.
        """
        cells = self.geometry.cells(self.geometry.strides[0])

        def compute(node: Node, read: list[Value]) -> Value:
            kind, name = self.geometry.kind[node.name], node.name
            known = coarse is not None and name not in self.geometry.masked
            stored = self.awaited(coarse, name) if coarse is not None and known else None
            if kind == "rows":
                lattice = self._restored(stored) if known else self._lattice(node, read, sites)
                return self._mixed(node, read, sites, lattice, (before or {}).get(name))
            if kind == "vector":
                return self._vector(node, read) if stored is None else stored
            return self._dense(node, [_grid(one) for one in read], cells)

        # with known lattices nothing reads the values between
        fused = coarse is not None and not wanted and fuses(sites.engine, self.images.device)
        nodes = self._later(late, fused)
        kept = {*self.geometry.exits, *self.geometry.vectors} if last else self.geometry.kept_rows
        kept = kept if late else kept | self.geometry.entries
        return self._run(nodes, dict(self.early()), {*kept, *wanted}, compute, coarse or ())

    def _later(self, late: bool, fused: bool = False) -> list[Node]:
        """What is not early, with late values or without; `fused`: as `Geometry.fused`."""
        first, kind = self.geometry.first, self.geometry.kind
        every = self.geometry.fused if fused else self.geometry.graph.nodes
        nodes = (node for node in every if node.name not in first)
        return [node for node in nodes if late or kind[node.name] != "late"]

    def late(self, values: Mapping[str, Value]) -> Grid:
        """The output, from the values that late ones read: early, vectors, and rows; these may be others than
        a run gave."""
        cells, known = self.geometry.cells(self.geometry.strides[0]), dict(values)
        late = self.geometry.of_kind("late")
        for node in late:
            known.pop(node.name, None)
        self._run(late, known, (), lambda node, read: self._dense(node, [_grid(one) for one in read], cells))
        return _grid(known[self.geometry.graph.output])

    def output(self, values: Mapping[str, Value]) -> Grid:
        """The grid of logits in what a run gave."""
        return _grid(values[self.geometry.graph.output])

    def awaited(self, values: Mapping[str, Value], name: str) -> Value:
        """What a dense run gave, None if it did not; a side stream waits for it."""
        if self.side is not None:
            self.side.needs(name)
        return values.get(name)

    def upsample(self, grid: Grid, every: int = 1) -> Tensor:
        """A grid of logits in float32 or more at every `every`-th pixel of the images."""
        logits, graph = at_least_float32(grid.tensor), self.geometry.graph
        trained = self.geometry.trained(graph.output)
        return upsample_logits(logits, self.size, grid.stride, trained, graph.align_corners, every)

    # -- one node ------------------------------------------------------------------------------------------

    def dense_node(self, node: Node, read: Sequence[Value]) -> Value:
        """A node's grid at the coarsest stride, from what it reads there."""
        return self._dense(node, list(read), self.geometry.cells(self.geometry.strides[-1]))

    def _run(
        self,
        nodes: Iterable[Node],
        values: Values,
        kept: Collection[str],
        compute: Callable[[Node, list[Value]], Value],
        known: Collection[str] = (),
    ) -> Values:
        """Compute nodes that are not there; drop values once read, but `kept` ones and the output.

        Args:
            known: names of values that belong to another run.
        """
        nodes, self._shared = list(nodes), {*values, *kept, *known}
        left = Counter(name for node in nodes for name in node.inputs)
        wanted = {*kept, self.geometry.graph.output}
        for node in nodes:
            if node.name not in values:
                values[node.name] = compute(node, [values[name] for name in node.inputs])
                if self.side is not None and node.name in wanted:
                    self.side.computed(node.name)
            for name in node.inputs:
                left[name] -= 1
                if not left[name] and name in values:
                    value = values[name] if name in wanted else values.pop(name)
                    if isinstance(value, (Grid, Mixed)):
                        value.settle()
        return values

    def _dense(self, node: Node, read: list[Value], cells: Mapping[str, int]) -> Value:
        """A node on grids and vectors."""
        if node.op == "image":
            return Grid(self.images, 1)
        if not self.geometry.captured[node.name]:
            return self._vector(node, read)
        cell, operator = cells[node.name], OPERATORS[node.op]
        if node.op == "resize":
            return self.resize(node, read[0], cell)
        size = grid_size(self.size, cell)
        self.counted(node, self.batch * size[0] * size[1])
        if node.name in self.taps:
            return Grid(self.on_grid(node, read[0], cell, size), cell)
        if node.op == "conv2d" and isinstance(read[0], Grid) and isinstance(operator, Spatial):
            step, source = cell // read[0].stride, read[0].tensor  # not thinned before: that leaves a layout
            grid = operator.grid(node, self.tensors_of(node), source, (step, step), (1, 1), (0, 0, 0, 0))
            return Grid(grid, cell)
        arrays = [one.thinned(cell) if isinstance(one, Grid) else one for one in read]
        return Grid(self._applied(node, arrays, self.trains(node)), cell)

    def _applied(self, node: Node, arrays: list[Tensor], training: bool) -> Tensor:
        """A node's values at each place, in the memory of those that it reads where nothing else does."""
        first, operator = node.inputs[0], OPERATORS[node.op]
        if first in self.geometry.overwritable and first not in self._shared:
            tracing = torch.jit.is_tracing() or torch.compiler.is_compiling()
            written = None if tracing or not _is_whole(arrays[0]) else operator.overwrite(node, arrays)
            if written is not None:
                return written
        return operator.apply(node, self.tensors_of(node), arrays, training)

    def shares(self, node: Node, source: int, cell: int) -> tuple[Any, ...]:
        """For each axis the places at `source` px around those at `cell` px that a resizing reads, see
        `ops.upsample.axis_shares`."""
        captured, to = self.geometry.trained(node.inputs[0]), self.geometry.captured[node.name]
        ratios, align = (source // cell, captured // to), node.options["align_corners"]
        sizes = zip(grid_size(self.size, source), grid_size(self.size, cell), strict=True)
        return tuple(axis_shares(*axis, *ratios, align, self.images.device) for axis in sizes)

    def lies_between(self, node: Node, source: int, cell: int) -> bool:
        """Whether a resizing from `source` to `cell` px reads as `shares` says: bilinear, no fewer places."""
        captured, to = self.geometry.captured[node.inputs[0]], self.geometry.captured[node.name]
        return not node.options.get("nearest") and captured >= to and source >= cell

    def resize(self, node: Node, source: Value, cell: int) -> Value:
        """Bilinear, with the offset that the network was captured with, whatever the strides are now."""
        captured, to = self.geometry.trained(node.inputs[0]), self.geometry.captured[node.name]
        size, align = grid_size(self.size, cell), node.options["align_corners"]
        nearest = bool(node.options.get("nearest"))
        if not isinstance(source, Grid):  # a vector of several places
            mode = "nearest" if nearest else "bilinear"
            made = F.interpolate(source, size, mode=mode, align_corners=None if nearest else align)
            return Grid(made, cell)
        if nearest:
            before = captured if captured >= to else source.stride
            return Grid(_nearest(source, size, grid_size(self.size, before), before), cell)
        if not self.lies_between(node, source.stride, cell):
            return Grid(F.interpolate(source.tensor, size, mode="bilinear", align_corners=align), cell)
        return Grid(upsample_logits(source.tensor, size, source.stride // cell, captured // to, align), cell)

    def _vector(self, node: Node, read: list[Value]) -> Tensor:
        """A node that gives a vector: of rows, a pooling reads the lattice; the last one of a head, all sites
        by their area."""
        operator = OPERATORS[node.op]
        if node.op == "zeros":
            return self.images.new_zeros(node.shape)
        if isinstance(read[0] if read else None, Mixed):
            if node.op == "global_mean" and node.name in self.geometry.final_pools:
                return read[0].mean_by_area()
            read = [read[0].lattice]
        arrays = [one.tensor if isinstance(one, Grid) else one for one in read]
        places = max([0, *[int(one.shape[0]) for one in arrays]])  # one, of what depends on no image
        self.counted(node, places)
        return operator.apply(node, self.tensors_of(node), arrays, self.trains(node))

    def _restored(self, value: Value) -> Value:
        """A value in the images' dtype, if it is a grid; it may have been stored in a smaller one."""
        if not isinstance(value, Grid) or value.tensor.dtype == self.images.dtype:
            return value
        return Grid(value.tensor.to(self.images.dtype), value.stride)

    def _lattice(self, node: Node, read: list[Value], sites: Sites) -> Grid | None:
        """A node's lattice in a mixed run; None where norms need all sites at once."""
        if self.trains(node) and OPERATORS[node.op].joins:
            return None
        if sites.apart is not None and node.name in self.taps and isinstance(read[0], Mixed):
            return self.apart_lattice(node, read[0], sites)
        grids = [self._lattice_source(node, one, sites) for one in read]
        return self._dense(node, grids, {node.name: self.geometry.lattice(node.name)})

    def _lattice_source(self, node: Node, value: Value, sites: Sites) -> Value:
        if not isinstance(value, Mixed):
            return value
        return value.densify(sites.exchange) if node.name in self.geometry.mixing else value.lattice

    def _mixed(
        self, node: Node, read: list[Value], sites: Sites, lattice: Grid | None, before: Mixed | None
    ) -> Mixed:
        """A node on rows, given its lattice."""
        if node.name in self.geometry.masked:  # a last pooling changes with each step, so all sites do
            read = [one.whole if isinstance(one, Mixed) else one for one in read]
            sites, before = sites.whole, None
        stride = self.geometry.lattice(node.name)
        ends: dict[int, Epilogue] = {}
        levels = {one: level for one, level in sites.levels.items() if one < stride}
        if node.op == FUSED:
            for one, level in levels.items():
                added = _rows(read[1], one, level) if len(read) > 1 else None
                ends[one] = Epilogue(added, *node.options["bounds"])
            node = self.geometry.graph.node(node.options["conv"])
        if self.trains(node) and OPERATORS[node.op].joins:
            return self._joined(node, read[0], sites, levels, stride)
        for level in levels.values() if self.count is not None else ():
            self.counted(node, level.num_run)
        if node.name in self.taps:
            rows = self.extra_rows(node, read[0], sites, levels, ends)
        elif ends:
            pairs = levels.items()
            rows = {one: self.own_rows(node, _rows(read[0], one, own), own, ends[one]) for one, own in pairs}
        else:
            rows = {
                one: self._applied(node, [_rows(value, one, level) for value in read], False)
                for one, level in levels.items()
            }
        return Mixed(lattice, rows, sites, before)

    def _joined(
        self, node: Node, source: Value, sites: Sites, levels: Mapping[int, Level], stride: int
    ) -> Mixed:
        """A node whose statistics are those of all sites, lattice and extra ones at once."""
        grid = source.lattice if isinstance(source, Mixed) else source
        lattice = Grid(grid.thinned(stride), stride)
        parts = [lattice.rows, *(_rows(source, one, level) for one, level in levels.items())]
        first, *extras = self.joined(node, parts, [None, *(level.valid for level in levels.values())])
        size = grid_size(self.size, stride)
        rows = dict(zip(levels, extras, strict=True))
        return Mixed(Grid(rows_to_grid(first, self.batch, size), stride), rows, sites)

    def joined(self, node: Node, parts: Sequence[Tensor], inside: Sequence[Tensor | None]) -> list[Tensor]:
        """A node whose statistics are those of all `parts` at once, each `[n, C]`.

        Args:
            inside: which rows of each part lie inside the images; None: all. Others become zero.
        """
        pairs = list(zip(parts, inside, strict=True))
        taken = [part if rows is None else part.index_select(0, rows) for part, rows in pairs]
        lengths = [part.shape[0] for part in taken]
        self.counted(node, sum(lengths))
        made = OPERATORS[node.op].apply(node, self.tensors_of(node), [torch.cat(taken)], True)
        return [
            out if rows is None else out.new_zeros(part.shape[0], out.shape[1]).index_copy(0, rows, out)
            for out, (part, rows) in zip(made.split(lengths), pairs, strict=True)
        ]

    def trains(self, node: Node) -> bool:
        """Whether a node behaves as in training."""
        return self.training and node.name not in self.frozen


def _nearest(source: Grid, size: tuple[int, int], cells: tuple[int, int], stride: int) -> Tensor:
    """A grid resized: at each place the source's value where a grid of `cells` at `stride` px had its own."""
    tensor = source.tensor
    for axis, length in enumerate(size):
        places = torch.arange(length, device=tensor.device) * cells[axis] // length * stride // source.stride
        tensor = tensor.index_select(2 + axis, places.clamp(max=int(tensor.shape[2 + axis]) - 1))
    return tensor


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor fills its memory, as no part of a larger one does; with gradients, no view either."""
    if torch.is_grad_enabled() and tensor._is_view():
        return False
    return tensor.is_contiguous() or (
        tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _grid(value: Value) -> Value:
    return value.densify() if isinstance(value, Mixed) else value


def _rows(value: Value, stride: int, level: Level) -> Tensor:
    """A value at a level's extra sites that are run: `[3 * run, C]`, or `[1, C]` of a lone image's vector."""
    if isinstance(value, Mixed):
        return value.own(stride)
    if isinstance(value, Grid):
        return value.at(level)
    vectors = value.reshape(*map(int, value.shape[:-2]))
    return vectors if vectors.shape[0] == 1 else vectors.index_select(0, level.image_of_row())
