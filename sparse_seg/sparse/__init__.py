"""Sparse levels: layouts of sites, convolution over them, densify. Knows nothing of segmentation."""

from sparse_seg.sparse.conv import SelectiveConv2d, SelectiveLinear
from sparse_seg.sparse.depthwise import SelectiveAvgPool2d, SelectiveDepthwiseConv2d
from sparse_seg.sparse.engines import ENGINES, EngineError
from sparse_seg.sparse.features import (
    dense_levels,
    densify,
    double,
    grid_to_rows,
    lattice_grid,
    rows_to_grid,
    select_rows,
    with_cells,
)
from sparse_seg.sparse.layout import EXCHANGES, SEPARATE, SiteLayout
from sparse_seg.sparse.neighbours import NeighbourTable
from sparse_seg.sparse.step import Memory, Step

__all__ = [
    "ENGINES",
    "EXCHANGES",
    "SEPARATE",
    "EngineError",
    "Memory",
    "NeighbourTable",
    "SelectiveAvgPool2d",
    "SelectiveConv2d",
    "SelectiveDepthwiseConv2d",
    "SelectiveLinear",
    "SiteLayout",
    "Step",
    "dense_levels",
    "densify",
    "double",
    "grid_to_rows",
    "lattice_grid",
    "rows_to_grid",
    "select_rows",
    "with_cells",
]
