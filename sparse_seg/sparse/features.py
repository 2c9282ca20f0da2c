"""Between grids `[B, C, H, W]` and rows `[N, C]`: views, not copies, where memory allows."""

from __future__ import annotations

from collections.abc import Hashable

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
