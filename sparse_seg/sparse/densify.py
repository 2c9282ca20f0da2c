"""Merge the levels into one dense grid at the finest stride."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sparse_seg.sparse.features import grid_to_rows, lattice_grid, rows_to_grid
from sparse_seg.sparse.layout import SiteLayout


def densify(rows: Tensor, layout: SiteLayout) -> Tensor:
    """Rows `[N, C]` to a channels_last grid `[B, C, H, W]` at the layout's finest stride.

    Sites keep their values; a cell without one gets the bilinear interpolation of the level above, between
    sites at multiples of their stride (cell 2i of the finer grid is cell i of the coarser one).
    """
    grid = lattice_grid(rows, layout)
    first = layout.num_lattice
    for new, fine in zip(layout.level_cells, layout.sizes[1:], strict=True):
        extra = rows[first : first + new.shape[0]]
        dense = grid_to_rows(_double(grid, fine))
        grid = rows_to_grid(dense.index_copy(0, new, extra), layout.batch, fine)
        first += new.shape[0]
    return grid


def _double(grid: Tensor, fine: tuple[int, int]) -> Tensor:
    """Twice the resolution: even places exact, odd places the mean of those around them inside the image."""
    height, width = grid.shape[2:]
    missing = (0, fine[1] - (2 * width - 1), 0, fine[0] - (2 * height - 1))  # a last odd column or row
    padded = F.pad(grid, missing, mode="replicate") if any(missing) else grid
    size = (2 * padded.shape[2] - 1, 2 * padded.shape[3] - 1)
    doubled = F.interpolate(padded, size=size, mode="bilinear", align_corners=True)
    return doubled[:, :, : fine[0], : fine[1]]
