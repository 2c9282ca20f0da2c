"""Where a network's values stand: complete grids, and the extra sites that a mask adds to them."""

from sparse_seg.sites.level import EXCHANGES, SEPARATE, Level
from sparse_seg.sites.plan import HERE, LevelPlan, Taps, grid_size, plan_of
from sparse_seg.sites.sites import Sites
from sparse_seg.sites.spconv import ENGINES, EngineError
from sparse_seg.sites.values import Grid, Mixed, TapTable, rows_to_grid

__all__ = [
    "ENGINES",
    "EXCHANGES",
    "HERE",
    "SEPARATE",
    "EngineError",
    "Grid",
    "Level",
    "LevelPlan",
    "Mixed",
    "Sites",
    "TapTable",
    "Taps",
    "grid_size",
    "plan_of",
    "rows_to_grid",
]
