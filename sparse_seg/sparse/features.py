"""Between grids `[B, C, H, W]` and rows `[N, C]`: views where memory allows; densify merges the levels."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch.nn.functional as F
from torch import Tensor

from sparse_seg.sparse.layout import SiteLayout
from sparse_seg.sparse.step import Step


def grid_to_rows(grid: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B*H*W, C]`; a view when the grid is channels_last."""
    return grid.permute(0, 2, 3, 1).reshape(-1, grid.shape[1])


def rows_to_grid(rows: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
    """`[B*H*W, C]` to `[B, C, H, W]` in channels_last memory; always a view."""
    return rows.view(batch, *size, rows.shape[1]).permute(0, 3, 1, 2)


def lattice_grid(rows: Tensor, layout: SiteLayout) -> Tensor:
    """The lattice rows of `[N, C]` as a channels_last grid `[B, C, Hc, Wc]`; a view."""
    return rows_to_grid(rows[: layout.num_lattice], layout.batch, layout.lattice_size)


def select_rows(rows: Tensor, src: Step, dst: Step, key: Hashable) -> Tensor:
    """Rows of `src` at the sites of `dst`: what a strided 1x1 convolution reads.

    key: the layer that reads them, see `Step.complete`.
    """
    index = dst.rows_at(src)
    return rows if index is None else dst.complete(rows, src, key).index_select(0, index)


def densify(rows: Tensor, layout: SiteLayout) -> Tensor:
    """Rows `[N, C]` to a channels_last grid `[B, C, H, W]` at the layout's finest stride.

    Sites keep their values; a cell without one gets the bilinear interpolation of the level above, between
    sites at multiples of their stride (cell 2i of the finer grid is cell i of the coarser one).
    """
    *_, grid = dense_levels(rows, layout)
    return grid


def dense_levels(rows: Tensor, layout: SiteLayout) -> Iterator[Tensor]:
    """`densify` level by level: the lattice's grid, then that of each finer level."""
    grid, first = lattice_grid(rows, layout), layout.num_lattice
    yield grid
    for new, fine in zip(layout.level_cells, layout.sizes[1:], strict=True):
        extra = rows[first : first + new.shape[0]]
        grid = with_cells(double(grid, fine), new, extra)
        first += new.shape[0]
        yield grid


def with_cells(grid: Tensor, cells: Tensor, rows: Tensor) -> Tensor:
    """A grid `[B, C, H, W]` with rows `[M, C]` at flat cells `[M]`."""
    flat = grid_to_rows(grid)  # under autocast, interpolation may have made it float32
    return rows_to_grid(
        flat.index_copy(0, cells, rows.to(flat.dtype)), grid.shape[0], (grid.shape[2], grid.shape[3])
    )


def double(grid: Tensor, fine: tuple[int, int]) -> Tensor:
    """Twice the resolution: even places exact, odd places the mean of those around them inside the image."""
    height, width = grid.shape[2:]
    missing = (0, fine[1] - (2 * width - 1), 0, fine[0] - (2 * height - 1))  # a last odd column or row
    padded = F.pad(grid, missing, mode="replicate") if any(missing) else grid
    size = (2 * padded.shape[2] - 1, 2 * padded.shape[3] - 1)
    doubled = F.interpolate(padded, size=size, mode="bilinear", align_corners=True)
    return doubled[:, :, : fine[0], : fine[1]]
