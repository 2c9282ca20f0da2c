"""A window on rows: its values at extra sites, and under `separate` at the lattice, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_seg.ops import OPERATORS, Node, Reads, Spatial
from sparse_seg.sites import Grid, Level, Mixed, Sites, rows_to_grid, spconv

if TYPE_CHECKING:
    from sparse_seg.run.values import Run


def extra_rows(
    run: Run, node: Node, value: Grid | Mixed, sites: Sites, levels: Mapping[int, Level]
) -> dict[int, Tensor]:
    """Rows `[3 * run, C]` of a window by the stride of a level; a mixing one reads the densified value."""
    mixes = node.name in run.geometry.mixing and isinstance(value, Mixed)
    source = value.densify(sites.exchange) if mixes and isinstance(value, Mixed) else value
    rows = {}
    for stride, level in levels.items():
        if isinstance(source, Mixed):
            rows[stride] = _of_mixed(run, node, source, stride)
            continue
        taps, apart = run.taps[node.name], sites.apart
        if apart is not None and isinstance(value, Mixed):
            index = apart.in_grid(taps, stride, source.stride, value.lattice.stride)
        else:
            index = level.grid_rows(taps, source.stride)
        rows[stride] = _gathered(run, node, source.padded_rows, index)
    return rows


def apart_lattice(run: Run, node: Node, value: Mixed, sites: Sites) -> Grid:
    """A window's lattice under `separate`: what it reads depends on the mask, so its sites are gathered."""
    assert sites.apart is not None
    stride, base, taps = run.geometry.lattice(node.name), value.lattice.stride, run.taps[node.name]
    level = sites.levels[stride // 2]
    run.counted(node, level.plan.cells)
    source = value.densify(sites.exchange) if node.name in run.geometry.mixing else value.lattice
    if source.stride == stride and _is_for_spconv(run, node, sites.engine, source.rows):
        tensors, blocks = run.tensors_of(node), sites.apart.blocks(stride, base)[:-1]
        weight, bias = tensors["weight"], tensors.get("bias")
        rows = spconv.lattice_conv2d(level, taps, source.rows, weight, bias, blocks)
    else:
        index = sites.apart.around_lattice(taps, stride, source.stride, base)
        rows = _gathered(run, node, source.padded_rows, index)
    return Grid(rows_to_grid(rows, level.plan.batch, level.plan.coarse), stride)


def _of_mixed(run: Run, node: Node, value: Mixed, stride: int) -> Tensor:
    sites, taps = value.sites, run.taps[node.name]
    level = sites.levels[stride]
    reads_all_extras = value.lattice.stride > stride and level.run == level.count > 0
    if reads_all_extras and _is_for_spconv(run, node, sites.engine, value.extras(stride)):
        tensors, blocks = run.tensors_of(node), sites.apart.of_extras(stride) if sites.apart else None
        weight, bias = tensors["weight"], tensors.get("bias")
        source = value.lattice.rows if level.exchange == "none" else value.complete(2 * stride)
        return spconv.level_conv2d(level, taps, source, value.extras(stride), weight, bias, blocks)
    table, index = value.reads(stride, taps)
    return _gathered(run, node, table, index)


def _gathered(run: Run, node: Node, table: Tensor, index: Tensor) -> Tensor:
    operator = OPERATORS[node.op]
    assert isinstance(operator, Spatial)
    return operator.rows(node, run.tensors_of(node), Reads(table, index, run.taps[node.name].number))


def _is_for_spconv(run: Run, node: Node, engine: str, rows: Tensor) -> bool:
    if engine == "gather" or node.op != "conv2d" or node.options["groups"] != 1:
        return False
    if not spconv.fits(run.taps[node.name]):
        return False
    if engine == "auto":
        compiles = torch.compiler.is_compiling()  # spconv's calls would break the graph
        return not compiles and spconv.suits(rows.device, spconv.computing_dtype(rows))
    return True
