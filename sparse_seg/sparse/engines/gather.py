"""The gather engine: the lattice through the vendor's dense convolution, extra sites by gather and GEMM.

Extra sites are processed in tiles: gather the nine neighbours of each site into `[T, 9*I]`, multiply by the
weight as a matrix `[9*I, O]`. Taps that the image border cuts off are left out where they are many. Backward
gathers again instead of saving nine copies of the activations: it holds the gradient of the rows, that of
the lattice, and one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_seg.sparse.features import grid_to_rows, lattice_grid
from sparse_seg.sparse.layout import SiteLayout
from sparse_seg.sparse.neighbours import NeighbourTable, TapGroup
from sparse_seg.sparse.step import Step

# Bytes of a gathered tile: many rows make an efficient GEMM (32 MiB was best of 1 to 64 on two Xeon cores).
TILE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}


def selective_conv2d(
    rows: Tensor,
    weight: Tensor,
    src: SiteLayout | Step,
    dst: SiteLayout | Step,
    spacing: int,
    exchange: str,
    bias: Tensor | None = None,
) -> Tensor:
    """3x3 convolution from the sites of `src` to the sites of `dst`, taps `spacing` px apart.

    Args:
        rows: `[N, I]` of all sites of `src`.
        weight: `[O, 3, 3, I]` (KRSC), contiguous.
        exchange: see `SiteLayout.neighbours_of_cells`.
        bias: `[O]`.

    Returns:
        `[dst.num_run, O]`. Where `dst` runs new sites only (see `Step`) there is no gradient.

    Raises:
        ValueError: the spacing does not fall on the lattice of `src`, or rows and layout differ in length.
    """
    src, dst = Step.of(src), Step.of(dst)
    check_rows(rows, src.layout)
    rows, weight = autocast(rows, weight)
    bias = None if bias is None else bias.to(rows.dtype)
    stride, dilation = lattice_conv_geometry(src.layout, dst.layout, spacing)
    if src.layout.separates(exchange):
        return every_site_conv2d(rows, weight, dst.neighbours(src, spacing, exchange), bias)
    if dst.runs_lattice and dst.layout.num_extra == 0:
        return lattice_conv2d(rows, weight, src.layout, stride, dilation, bias)
    table = dst.neighbours(src, spacing, exchange)
    if not dst.runs_lattice:
        out = rows.new_empty(dst.num_run, weight.shape[0])
        multiply_neighbours(rows, weight, table, out, bias)
        return out
    return _SelectiveConv2d.apply(rows, weight, src.layout, dst.layout, table, stride, dilation, bias)


def check_rows(rows: Tensor, layout: SiteLayout) -> None:
    """Raises ValueError where rows and layout differ in length."""
    if rows.shape[0] != layout.num_sites:
        raise ValueError(f"{rows.shape[0]} rows given for a layout of {layout.num_sites} sites")


def lattice_conv_geometry(src: SiteLayout, dst: SiteLayout, spacing: int) -> tuple[int, int]:
    """`(stride, dilation)` of the plain convolution from lattice to lattice.

    Raises:
        ValueError: the taps would fall between the lattice's places.
    """
    stride, rest = divmod(dst.lattice_stride, src.lattice_stride)
    if rest or spacing % src.lattice_stride:
        raise ValueError(
            f"taps {spacing} px apart do not fall on a lattice of stride {src.lattice_stride} "
            f"(output lattice: stride {dst.lattice_stride})"
        )
    return stride, spacing // src.lattice_stride


def autocast_dtype(rows: Tensor) -> torch.dtype:
    """The dtype a convolution of these rows runs in: autocast's, or their own."""
    return torch.get_autocast_dtype(rows.device.type) if _autocasts(rows) else rows.dtype


def autocast(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast does for built-in convolutions; a custom function has to ask for it."""
    if not _autocasts(rows):
        return rows, weight
    dtype = autocast_dtype(rows)
    return rows.to(dtype), weight.to(dtype)


def _autocasts(rows: Tensor) -> bool:
    return torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64


def lattice_conv2d(
    rows: Tensor, weight: Tensor, src: SiteLayout, stride: int, dilation: int, bias: Tensor | None = None
) -> Tensor:
    """The lattice part of a convolution, `[src.num_sites, I]` to `[dst.num_lattice, O]`; differentiable."""
    oihw = weight.permute(0, 3, 1, 2)  # the same memory, channels_last
    return grid_to_rows(F.conv2d(lattice_grid(rows, src), oihw, bias, stride, dilation, dilation))


def ghost_rows(rows: Tensor, table: NeighbourTable) -> Tensor:
    """`[G, I]`: the value of each ghost; differentiable."""
    if not table.num_ghosts:
        return rows.new_zeros(0, rows.shape[1])
    # 2 to 4 times faster than indexing and adding
    return F.embedding_bag(table.ghosts, rows, mode="sum").div_(table.ghosts.shape[1])


def neighbour_values(rows: Tensor, table: NeighbourTable) -> Tensor:
    """`[N + G + 1, I]`: what the table's index reads, rows, ghosts and zero; differentiable."""
    return torch.cat((rows, ghost_rows(rows, table), rows.new_zeros(1, rows.shape[1])))


class _Tiles:
    """The tiles of a table's groups, with one reused buffer `[T * taps, I]` for what their taps read."""

    def __init__(self, source: Tensor, table: NeighbourTable) -> None:
        self.row_bytes = source.shape[1] * source.element_size()
        self.max_bytes = TILE_BYTES.get(source.device.type, TILE_BYTES["cpu"])
        rows = max(self._max_sites(group) * group.index.shape[1] for group in table.groups)
        self.buffer = source.new_empty(rows, source.shape[1])

    def _max_sites(self, group: TapGroup) -> int:
        sites, taps = group.index.shape
        return min(sites, max(1, self.max_bytes // (taps * self.row_bytes)))

    def of(self, group: TapGroup) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields (sites of the group, `[T * taps]` what they read, room for it `[T * taps, I]`)."""
        for sites in group.tiles(self._max_sites(group)):
            index = group.index[sites].flatten()
            yield sites, index, self.buffer[: index.shape[0]]

    def gathered(self, source: Tensor, group: TapGroup) -> Iterator[tuple[slice, Tensor]]:
        """Yields (sites of the group, their neighbours `[T, taps * I]`); a tile is valid until the next."""
        for sites, index, values in self.of(group):
            torch.index_select(source, 0, index, out=values)
            yield sites, values.view(sites.stop - sites.start, -1)


def multiply_neighbours(
    rows: Tensor, weight: Tensor, table: NeighbourTable, out: Tensor, bias: Tensor | None = None
) -> None:
    """The extra sites' outputs `[M, O]`, written to `out`; without autograd."""
    if not table.groups:
        return
    source = neighbour_values(rows, table)
    tiles = _Tiles(source, table)
    for group in table.groups:
        (columns, first), *rest = group.weight_blocks(weight)
        result = out if group.sites is None else out.new_empty(group.index.shape[0], out.shape[1])
        for sites, values in tiles.gathered(source, group):
            part = result[sites]
            if bias is None:
                torch.mm(values[:, columns], first.t(), out=part)
            else:
                torch.addmm(bias, values[:, columns], first.t(), out=part)
            for more, block in rest:
                part.addmm_(values[:, more], block.t())
        if group.sites is not None:
            out.index_copy_(0, group.sites, result)


class _SelectiveConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        src: SiteLayout,
        dst: SiteLayout,
        table: NeighbourTable,
        stride: int,
        dilation: int,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.plan = src, dst, table, stride, dilation
        out = rows.new_empty(dst.num_sites, weight.shape[0])
        out[: dst.num_lattice] = lattice_conv2d(rows, weight, src, stride, dilation, bias)
        multiply_neighbours(rows, weight, table, out[dst.num_lattice :], bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        src, dst, table, stride, dilation = ctx.plan
        grad_rows, grad_oihw, _ = torch.ops.aten.convolution_backward(
            lattice_grid(grad, dst),
            lattice_grid(rows, src),
            weight.permute(0, 3, 1, 2),
            None,
            [stride] * 2,
            [dilation] * 2,
            [dilation] * 2,
            False,
            [0, 0],
            1,
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
        )
        extra_grad = grad[dst.num_lattice :]
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = grad_oihw.permute(0, 2, 3, 1).contiguous()
            grad_weight = add_weight_grad(grad_weight, extra_grad, rows, table)
        if ctx.needs_input_grad[0]:
            grad_rows = rows_grad(grad_rows, extra_grad, weight, table)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[7] else None
        return grad_rows, grad_weight, None, None, None, None, None, grad_bias


def every_site_conv2d(
    rows: Tensor, weight: Tensor, table: NeighbourTable, bias: Tensor | None = None
) -> Tensor:
    """`[N, I]` to `[M, O]` of the M sites of a table that has the lattice's, too; differentiable."""
    return _EverySite.apply(rows, weight, table, bias)


class _EverySite(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, table: NeighbourTable, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.table = table
        out = rows.new_empty(table.index.shape[0], weight.shape[0])
        multiply_neighbours(rows, weight, table, out, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = add_weight_grad(torch.zeros_like(weight), grad, rows, ctx.table)
        if ctx.needs_input_grad[0]:
            no_lattice = rows.new_zeros(1, rows.shape[1], 0, 0)
            grad_rows = rows_grad(no_lattice, grad, weight, ctx.table)
        return grad_rows, grad_weight, None, grad.sum(0) if ctx.needs_input_grad[3] else None


def add_weight_grad(grad_weight: Tensor, grad: Tensor, rows: Tensor, table: NeighbourTable) -> Tensor:
    """The weight's gradient plus what the extra sites contribute."""
    source = neighbour_values(rows, table)
    tiles = _Tiles(source, table)
    # half precision would lose small addends over many tiles: it sums in float32
    total = grad_weight.to(torch.promote_types(grad_weight.dtype, torch.float32))
    for group in table.groups:
        blocks, of_group = group.weight_blocks(total), _of_group(grad, group)
        for sites, values in tiles.gathered(source, group):
            for columns, block in blocks:
                if total.dtype == rows.dtype:
                    block.addmm_(of_group[sites].t(), values[:, columns])
                else:
                    block += of_group[sites].t() @ values[:, columns]
    return total.to(grad_weight.dtype)


def rows_grad(lattice_grad: Tensor, grad: Tensor, weight: Tensor, table: NeighbourTable) -> Tensor:
    """`[N, I]`: the gradient of the lattice `[B, I, Hc, Wc]` plus what the extra sites contribute."""
    total = lattice_grad.new_zeros(table.num_rows + table.num_ghosts + 1, lattice_grad.shape[1])
    lattice = grid_to_rows(lattice_grad)
    total[: lattice.shape[0]] = lattice
    tiles = _Tiles(total, table)
    for group in table.groups:
        blocks, of_group = group.weight_blocks(weight), _of_group(grad, group)
        for sites, index, values in tiles.of(group):
            for columns, block in blocks:
                torch.mm(of_group[sites], block, out=values.view(sites.stop - sites.start, -1)[:, columns])
            total.index_add_(0, index, values)
    grad_rows, grad_ghosts = total[: table.num_rows], total[table.num_rows : -1]
    if table.num_ghosts:
        grad_ghosts /= table.ghosts.shape[1]
        for rows in table.ghosts.unbind(1):
            grad_rows.index_add_(0, rows, grad_ghosts)
    return grad_rows


def _of_group(grad: Tensor, group: TapGroup) -> Tensor:
    return grad if group.sites is None else grad[group.sites]
