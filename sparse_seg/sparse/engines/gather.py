"""The gather engine: the lattice through the vendor's dense convolution, extra sites by gather and GEMM.

Extra sites are processed in tiles that stay in cache: gather the nine neighbours of each site into
`[T, 9*I]`, multiply by the weight as a matrix `[9*I, O]`. Backward gathers again in place of saving nine
copies of the activations: it holds the gradient of the rows, that of the lattice, and one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_seg.sparse.features import grid_to_rows, lattice_grid
from sparse_seg.sparse.layout import TAPS, NeighbourTable, SiteLayout

# Bytes of a gathered tile: many rows make an efficient GEMM (16 MiB was best of 1 to 64 on two Xeon cores).
TILE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}


def selective_conv2d(
    rows: Tensor, weight: Tensor, src: SiteLayout, dst: SiteLayout, spacing: int, exchange: str
) -> Tensor:
    """3x3 convolution from the sites of `src` to those of `dst`, taps `spacing` px apart.

    Args:
        rows: `[src.num_sites, I]`.
        weight: `[O, 3, 3, I]` (KRSC), contiguous.
        exchange: see `SiteLayout.neighbours`.

    Returns:
        `[dst.num_run, O]`. Where `dst` runs new sites only (`StepLayout`) there is no gradient.

    Raises:
        ValueError: the spacing does not fall on the lattice of `src`, or rows and layout differ in length.
    """
    check_rows(rows, src)
    rows, weight = autocast(rows, weight)
    stride, dilation = lattice_conv_geometry(src, dst, spacing)
    if dst.runs_lattice and dst.num_extra == 0:
        return lattice_conv2d(rows, weight, src, stride, dilation)
    table = src.neighbours(dst, spacing, exchange)
    if not dst.runs_lattice:
        out = rows.new_empty(dst.num_run, weight.shape[0])
        multiply_neighbours(rows, weight, table, out)
        return out
    return _SelectiveConv2d.apply(rows, weight, src, dst, table, stride, dilation)


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


def lattice_conv2d(rows: Tensor, weight: Tensor, src: SiteLayout, stride: int, dilation: int) -> Tensor:
    """The lattice part of a convolution, `[src.num_sites, I]` to `[dst.num_lattice, O]`; differentiable."""
    oihw = weight.permute(0, 3, 1, 2)  # the same memory, channels_last
    return grid_to_rows(F.conv2d(lattice_grid(rows, src), oihw, None, stride, dilation, dilation))


def ghost_rows(rows: Tensor, table: NeighbourTable) -> Tensor:
    """`[G, I]`: the value of each ghost; differentiable."""
    if not table.ghosts.shape[0]:
        return rows.new_zeros(0, rows.shape[1])
    return _ghost_sums(rows, table) / table.ghosts.shape[1]


def _ghost_sums(rows: Tensor, table: NeighbourTable) -> Tensor:
    # 2 to 4 times faster than indexing and adding
    return F.embedding_bag(table.ghosts, rows, mode="sum")


class _Tiles:
    """Walks over the extra sites tile by tile, with one reused buffer for the nine neighbours of each."""

    def __init__(self, rows: Tensor, table: NeighbourTable) -> None:
        self.rows, self.table = rows, table
        sites, channels = table.index.shape[0], rows.shape[1]
        budget = TILE_BYTES.get(rows.device.type, TILE_BYTES["cpu"])
        self.tile = min(sites, max(1, budget // (TAPS * channels * rows.element_size())))
        self.buffer = rows.new_empty(self.tile * TAPS, channels)

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """Yields (extra sites, their places in the special lists)."""
        bounds = self.table.special_bounds(self.tile)
        sites = self.table.index.shape[0]
        for number, first in enumerate(range(0, sites, self.tile)):
            yield slice(first, min(first + self.tile, sites)), slice(bounds[number], bounds[number + 1])

    def places(self, extra: slice, special: slice) -> Tensor:
        """Where the specials of a tile stand in its buffer."""
        return self.table.special_places[special] - extra.start * TAPS

    def gather(self, extra: slice, special: slice, ghosts: Tensor) -> Tensor:
        """`[T, 9*I]`: the tile's neighbours. Valid until the next call."""
        index = self.table.index[extra].flatten()
        tile = self.buffer[: index.shape[0]]
        torch.index_select(self.rows, 0, index, out=tile)
        specials = ghosts.index_select(0, self.table.special_ghosts[special])
        tile.index_copy_(0, self.places(extra, special), specials)
        return tile.view(-1, TAPS * self.rows.shape[1])


def _ghosts_and_zero(rows: Tensor, table: NeighbourTable) -> Tensor:
    """`[G + 1, I]`: the value of each ghost, and zero. Not differentiable."""
    ghosts = rows.new_zeros(table.ghosts.shape[0] + 1, rows.shape[1])
    if table.ghosts.shape[0]:
        torch.div(_ghost_sums(rows, table), table.ghosts.shape[1], out=ghosts[:-1])
    return ghosts


def multiply_neighbours(
    rows: Tensor, weight: Tensor, table: NeighbourTable, out: Tensor, bias: Tensor | None = None
) -> None:
    """The extra sites' outputs `[M, O]`, written to `out`; without autograd."""
    if not out.shape[0]:
        return
    tiles, matrix, ghosts = _Tiles(rows, table), weight.flatten(1).t(), _ghosts_and_zero(rows, table)
    for extra, special in tiles:
        tile = tiles.gather(extra, special, ghosts)
        if bias is None:
            torch.mm(tile, matrix, out=out[extra])
        else:
            torch.addmm(bias, tile, matrix, out=out[extra])


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
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.plan = src, dst, table, stride, dilation
        out = rows.new_empty(dst.num_sites, weight.shape[0])
        out[: dst.num_lattice] = lattice_conv2d(rows, weight, src, stride, dilation)
        multiply_neighbours(rows, weight, table, out=out[dst.num_lattice :])
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
            grad_weight = _add_weight_grad(grad_weight, extra_grad, rows, table)
        if ctx.needs_input_grad[0]:
            grad_rows = _with_extra(grad_rows, src)
            _add_rows_grad(grad_rows, extra_grad, weight, table)
        return grad_rows, grad_weight, None, None, None, None, None


def _with_extra(grad_grid: Tensor, layout: SiteLayout) -> Tensor:
    """Gradient of the lattice `[B, C, Hc, Wc]` as that of all rows `[N, C]`, zero at the extra sites."""
    grad_rows = grad_grid.new_zeros(layout.num_sites, grad_grid.shape[1])
    grad_rows[: layout.num_lattice] = grid_to_rows(grad_grid)
    return grad_rows


def _add_weight_grad(grad_weight: Tensor, grad: Tensor, rows: Tensor, table: NeighbourTable) -> Tensor:
    """The weight's gradient plus what the extra sites' outputs contribute."""
    tiles, ghosts = _Tiles(rows, table), _ghosts_and_zero(rows, table)
    # half precision would lose small addends over many tiles: it sums in float32
    total = grad_weight.to(torch.promote_types(grad_weight.dtype, torch.float32))
    matrix = total.flatten(1)
    for extra, special in tiles:
        if total.dtype == rows.dtype:
            matrix.addmm_(grad[extra].t(), tiles.gather(extra, special, ghosts))
        else:
            matrix += grad[extra].t() @ tiles.gather(extra, special, ghosts)
    return total.to(grad_weight.dtype)


def _add_rows_grad(grad_rows: Tensor, grad: Tensor, weight: Tensor, table: NeighbourTable) -> None:
    """Add what the extra sites' outputs contribute to the gradient of the rows, in place."""
    tiles, matrix = _Tiles(grad_rows, table), weight.flatten(1)
    grad_ghosts = grad_rows.new_zeros(table.ghosts.shape[0] + 1, grad_rows.shape[1])
    for extra, special in tiles:
        index = table.index[extra].flatten()
        grad_tile = tiles.buffer[: index.shape[0]]
        torch.mm(grad[extra], matrix, out=grad_tile.view(-1, matrix.shape[1]))
        places = tiles.places(extra, special)
        grad_ghosts.index_add_(0, table.special_ghosts[special], grad_tile[places])
        grad_tile.index_fill_(0, places, 0)
        grad_rows.index_add_(0, index, grad_tile)
    if table.ghosts.shape[0]:
        grad_ghosts /= table.ghosts.shape[1]
        for source in table.ghosts.unbind(1):
            grad_rows.index_add_(0, source, grad_ghosts[:-1])
