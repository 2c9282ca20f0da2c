"""Sparse levels: layouts of sites, convolution over them, densify. Knows nothing of segmentation."""

from .conv import SelectiveConv2d
from .densify import densify
from .features import grid_to_rows, lattice_grid, rows_to_grid, select_rows
from .layout import EXCHANGES, NeighbourTable, SiteLayout

__all__ = [
    "EXCHANGES",
    "NeighbourTable",
    "SelectiveConv2d",
    "SiteLayout",
    "densify",
    "grid_to_rows",
    "lattice_grid",
    "rows_to_grid",
    "select_rows",
]
