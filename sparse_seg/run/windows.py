"""Windows of a graph for images of one size: on grids and at sites, the lattice's under `separate`, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_seg.graph import Geometry
from sparse_seg.ops import OPERATORS, Node, Reads, Spatial
from sparse_seg.ops.convolution import kernel_of
from sparse_seg.sites import Grid, Level, Mixed, Sites, Taps, TapTable, rows_to_grid, spconv, triton
from sparse_seg.sites.values import NOTHING, Epilogue

Ends = Mapping[int, Epilogue]  # what follows a convolution, by a level's stride


class Windows:
    """Where a graph's windows read, and what they give.

    Args:
        geometry: of the graph.
        tensors: by the graph's names.
        size: of the images, px.
        count: told of each node that ran, and at how many places.
    """

    def __init__(
        self,
        geometry: Geometry,
        tensors: Mapping[str, Tensor],
        size: tuple[int, int],
        count: Callable[[Node, int], None] | None = None,
    ) -> None:
        self.geometry, self.tensors, self.size, self.count = geometry, tensors, size, count
        windows = [node for node in geometry.graph.nodes if geometry.window(node)]
        inside = {node.name: geometry.inside(node, size) for node in windows}
        self.taps = {name: taps for name, (taps, _) in inside.items()}
        self.kernels = {name: part for name, (_, part) in inside.items() if part is not None}

    def tensors_of(self, node: Node) -> dict[str, Tensor]:
        """A node's tensors by role; of a kernel the part that ever reads inside the images."""
        tensors = {role: self.tensors[name] for role, name in node.tensors.items()}
        if node.name in self.kernels:
            tensors["weight"] = tensors["weight"][(slice(None), slice(None), *self.kernels[node.name])]
        return tensors

    def counted(self, node: Node, places: int) -> None:
        """Tell that a node ran at so many places."""
        if self.count is not None:
            self.count(node, places)

    def dilated(self, node: Node, source: int) -> Taps:
        """Where a window reads in a grid at `source` px: as captured, but at least one cell apart."""
        window, unit = self.geometry.window(node), self.geometry.captured[node.inputs[0]]
        assert window is not None
        axes = []
        for places, dilation in zip(self.taps[node.name], window.dilation, strict=True):
            spacing = dilation * unit
            step = 1 if node.options.get("cell") else max(1, spacing // source)
            before = -places[0] * step // spacing
            axes.append(tuple((tap * step - before) * source for tap in range(len(places))))
        return Taps(*axes)

    def on_grid(self, node: Node, source: Grid, cell: int, size: tuple[int, int]) -> Tensor:
        """A window on a grid: its taps lie as many px apart as captured, but at least one cell."""
        operator, step = OPERATORS[node.op], cell // source.stride
        assert isinstance(operator, Spatial)
        pads: list[tuple[int, int]] = []
        dilations: list[int] = []
        for axis, taps in enumerate(self.dilated(node, source.stride)):
            places = [tap // source.stride for tap in taps]
            end = (size[axis] - 1) * step + places[-1]
            before, after = -places[0], end + 1 - int(source.tensor.shape[2 + axis])
            # a stride may leave some places at the end that no window reads
            pads.append((before, before if after <= before < after + step else after))
            dilations.append(places[1] - places[0] if len(places) > 1 else 1)
        (above, below), (left, right) = pads
        steps, apart = (step, step), (dilations[0], dilations[1])
        return operator.grid(
            node, self.tensors_of(node), source.tensor, steps, apart, (left, right, above, below)
        )

    def extra_rows(
        self, node: Node, value: Grid | Mixed, sites: Sites, levels: Mapping[int, Level], ends: Ends
    ) -> dict[int, Tensor]:
        """Rows `[3 * run, C]` of a window by a level's stride; a mixing one reads the densified value."""
        mixes = node.name in self.geometry.mixing and isinstance(value, Mixed)
        source = value.densify(sites.exchange) if mixes and isinstance(value, Mixed) else value
        rows = {}
        for stride, level in levels.items():
            end = ends.get(stride, NOTHING)
            if isinstance(source, Mixed):
                rows[stride] = self._of_mixed(node, source, stride, end)
                continue
            taps, apart = self.taps[node.name], sites.apart
            if apart is not None and isinstance(value, Mixed):
                index = apart.in_grid(taps, stride, source.stride, value.lattice.stride)
            else:
                index = level.grid_rows(taps, source.stride)
            rows[stride] = self._of_grid(node, source, index, sites.engine, end)
        return rows

    def own_rows(self, node: Node, rows: Tensor, level: Level, end: Epilogue) -> Tensor:
        """A 1x1 convolution of the extra sites' own rows `[3 * run, C]`, and what follows it."""
        index = level.cached("own", lambda: torch.arange(int(rows.shape[0]), device=rows.device))
        found = self._by_triton(node, rows, index, None, None, end)
        if found is None:
            found = end(OPERATORS[node.op].apply(node, self.tensors_of(node), [rows], False))
        return found

    def apart_lattice(self, node: Node, value: Mixed, sites: Sites) -> Grid:
        """A window's lattice under `separate`: it depends on the mask, so its sites are gathered."""
        assert sites.apart is not None
        stride, base, taps = self.geometry.lattice(node.name), value.lattice.stride, self.taps[node.name]
        level = sites.levels[stride // 2]
        self.counted(node, level.plan.cells)
        source = value.densify(sites.exchange) if node.name in self.geometry.mixing else value.lattice
        if source.stride == stride and self._is_for_spconv(node, sites.engine):
            tensors, blocks = self.tensors_of(node), sites.apart.blocks(stride, base)[:-1]
            weight, bias = tensors["weight"], tensors.get("bias")
            rows = spconv.lattice_conv2d(level, taps, source.rows, weight, bias, blocks)
        else:
            index = sites.apart.around_lattice(taps, stride, source.stride, base)
            rows = self._of_grid(node, source, index, sites.engine, NOTHING)
        return Grid(rows_to_grid(rows, level.plan.batch, level.plan.coarse), stride)

    def _of_mixed(self, node: Node, value: Mixed, stride: int, end: Epilogue) -> Tensor:
        sites, taps = value.sites, self.taps[node.name]
        level = sites.levels[stride]
        reads_all_extras = value.lattice.stride > stride and level.run == level.count > 0
        if reads_all_extras and self._is_for_spconv(node, sites.engine):
            tensors, blocks = self.tensors_of(node), sites.apart.of_extras(stride) if sites.apart else None
            weight, bias = tensors["weight"], tensors.get("bias")
            source = value.lattice.rows if level.exchange == "none" else value.complete(2 * stride)
            return spconv.level_conv2d(level, taps, source, value.extras(stride), weight, bias, blocks)
        if self._is_for_triton(node, sites.engine, value.lattice):
            rows, index, ghosts = value.reads_apart(stride, taps)
            found = self._by_triton(node, rows, index, ghosts, level, end)
            if found is not None:
                return found
        return end(self._gathered(node, *value.reads(stride, taps)))

    def _of_grid(self, node: Node, source: Grid, index: Tensor, engine: str, end: Epilogue) -> Tensor:
        is_one = self._is_for_triton(node, engine, source)
        found = self._by_triton(node, source.rows, index, None, None, end) if is_one else None
        return end(self._gathered(node, source.table, index)) if found is None else found

    def _by_triton(self, node: Node, rows: Tensor, index: Tensor, *ghosts: Any) -> Tensor | None:
        """See `triton.conv2d`; None where that is for gather."""
        tensors = self.tensors_of(node)
        return triton.conv2d(rows, index, kernel_of(tensors["weight"]), tensors.get("bias"), *ghosts)

    def _gathered(self, node: Node, table: TapTable, index: Tensor, shares: Tensor | None = None) -> Tensor:
        operator = OPERATORS[node.op]
        assert isinstance(operator, Spatial)
        reads = Reads(table.rows, index, self.taps[node.name].number, table.make, table.parts, shares)
        return operator.rows(node, self.tensors_of(node), reads)

    def _is_for_spconv(self, node: Node, engine: str) -> bool:
        is_one = engine == "spconv" and node.op == "conv2d" and node.options["groups"] == 1
        return is_one and spconv.fits(self.taps[node.name])

    def _is_for_triton(self, node: Node, engine: str, source: Grid) -> bool:
        is_one = engine == "triton" and node.op == "conv2d" and triton.may_run(source.tensor.device)
        return is_one and not (torch.jit.is_tracing() or torch.compiler.is_compiling())


def fuses(engine: str, device: torch.device) -> bool:
    """Whether what follows convolutions may run as part of them."""
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.is_grad_enabled()
    is_one = engine == "triton" and triton.may_run(device) and not traced
    return is_one and not torch.is_autocast_enabled(device.type)
