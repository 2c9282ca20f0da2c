"""Which sites exist, in which order their rows stand, and who is whose neighbour.

All sites' features are the rows of one matrix `[N, C]`. A `SiteLayout` gives those rows their places: first
the *lattice*, the complete grid of the coarsest level in (image, y, x) order, then, level by level, the
*extra* sites that finer levels add. A level is added by a *split* mask over the cells of the level before:
a split cell keeps its own site (the top-left one, phase 0) and gains its phases 1, 2 and 3, those of them
that lie inside the image. A dense network is a layout without splits.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_seg.sites import EXCHANGES, SEPARATE
from sparse_seg.sparse.grids import cells_apart, check_split, children, parents, repeat, spread, unflatten
from sparse_seg.sparse.neighbours import NeighbourTable

_T = TypeVar("_T")


class SiteLayout:
    """Sites of nested levels over a batch of images; immutable.

    Args:
        batch: number of images B.
        size: `(H, W)` of the finest level's grid.
        stride: its stride in pixels; each coarser level doubles it.
        splits: from the coarsest level on, which cells gain the next level's sites: bool `[B, h, w]` each.
            A level below the first may split only cells that have a site.
        device: where index tensors live; taken from the splits when there are any.

    Raises:
        ValueError: a split of the wrong shape or dtype, or one that splits a cell without a site.
    """

    def __init__(
        self,
        batch: int,
        size: tuple[int, int],
        stride: int,
        splits: Sequence[Tensor] = (),
        device: torch.device | str | None = None,
    ) -> None:
        self.batch, self.size, self.stride, self.splits = batch, (size[0], size[1]), stride, tuple(splits)
        self.device = splits[0].device if splits else torch.device(device or "cpu")
        self.sizes = [self.size]  # coarsest level first
        for _ in splits:
            height, width = self.sizes[0]
            self.sizes.insert(0, ((height + 1) // 2, (width + 1) // 2))
        self.lattice_size = self.sizes[0]
        self.lattice_stride = stride * 2 ** len(splits)
        self.num_lattice = batch * self.lattice_size[0] * self.lattice_size[1]
        self._tables: weakref.WeakKeyDictionary[SiteLayout, dict] = weakref.WeakKeyDictionary()
        self._cache: dict[Hashable, Any] = {}
        self._build()

    @classmethod
    def from_fine_blocks(cls, fine_blocks: Tensor, size: tuple[int, int], stride: int = 8) -> SiteLayout:
        """Two levels: `fine_blocks [B, ceil(H/2), ceil(W/2)]` bool over a fine grid of `size` (H, W)."""
        return cls(fine_blocks.shape[0], size, stride, (fine_blocks,))

    def _build(self) -> None:
        """Number the sites level by level: `site` (row or -1) and `owner` (row) of every cell."""
        self.level_cells: list[Tensor] = []  # per added level, flat cells of its new sites in its own grid
        # a dense layout makes its numbering only when asked: convolutions need none
        self._numbering: tuple[Tensor, Tensor] | None = None
        self.num_sites = self.num_lattice
        if not self.splits:
            return
        site = owner = self._lattice_numbers
        for split, coarse, fine in zip(self.splits, self.sizes, self.sizes[1:], strict=False):
            check_split(split, (self.batch, *coarse), site)
            new = children(split, fine)
            numbers = torch.arange(self.num_sites, self.num_sites + new.shape[0], device=self.device)
            site = spread(site, fine).index_put_(unflatten(new, fine), numbers)
            owner = repeat(owner, fine).index_put_(unflatten(new, fine), numbers)
            self.level_cells.append(new)
            self.num_sites += new.shape[0]
        self._numbering = site, owner

    @cached_property
    def _lattice_numbers(self) -> Tensor:
        return torch.arange(self.num_lattice, device=self.device).view(self.batch, *self.lattice_size)

    @property
    def strides(self) -> list[int]:
        """Of the levels in px, coarsest first."""
        return [self.lattice_stride >> level for level in range(len(self.sizes))]

    @property
    def num_extra(self) -> int:
        """How many sites are not the lattice's."""
        return self.num_sites - self.num_lattice

    @property
    def is_full(self) -> bool:
        """Whether every cell of the finest grid has a site."""
        return self.num_sites == self.batch * self.size[0] * self.size[1]

    @property
    def site(self) -> Tensor:
        """`[B, H, W]` int64: for each cell of the finest grid the row of its own site, or -1."""
        return self._numbering[0] if self._numbering else self._lattice_numbers

    @property
    def owner(self) -> Tensor:
        """`[B, H, W]` int64: for each cell of the finest grid the row of its own site or else its block's."""
        return self._numbering[1] if self._numbering else self._lattice_numbers

    @cached_property
    def level(self) -> Tensor:
        """`[B, H, W]` int64: the level of each cell of the finest grid, by how often its block is split."""
        level = torch.zeros_like(self._lattice_numbers)
        for split, fine in zip(self.splits, self.sizes[1:], strict=True):
            level = repeat(level + split, fine)
        return level

    def separates(self, exchange: str) -> bool:
        """Whether this rule keeps levels apart here: then all sites are gathered, the lattice's, too."""
        return exchange == SEPARATE and bool(self.splits)

    @cached_property
    def cells(self) -> Tensor:
        """`[N]` int64: each row's flat cell `(b * H + y) * W + x` in the finest grid."""
        site = self.site.flatten()
        places = (site >= 0).nonzero().squeeze(1)
        return torch.empty_like(places).index_copy_(0, site[places], places)

    @cached_property
    def image_of_row(self) -> Tensor:
        """`[N]` int64: which image of the batch a row belongs to."""
        return self.cells // (self.size[0] * self.size[1])

    @cached_property
    def areas(self) -> Tensor:
        """`[N]` int64: finest cells that a row stands for, a block at the border counted whole."""
        area = torch.full((self.num_sites,), 4 ** len(self.splits), device=self.device)
        first = self.num_lattice
        for level, (new, split) in enumerate(zip(self.level_cells, self.splits, strict=True), start=1):
            cell_area = 4 ** (len(self.splits) - level)
            step = 2 ** (len(self.splits) - level + 1)
            area[self.site[:, ::step, ::step][split]] = cell_area
            area[first : first + new.shape[0]] = cell_area
            first += new.shape[0]
        return area

    @cached_property
    def interpolation(self) -> Tensor:
        """`[B*H*W, 4**levels]` int64: rows whose mean is a cell's bilinear value (repeats are weights).

        Level by level, an odd place is the mean of the 2 or 4 places around it that lie inside the image,
        and a cell with a site of its own is that site. `densify` follows the same rule.
        """
        table = self._lattice_numbers.flatten()[:, None]
        first = self.num_lattice
        for new, coarse, fine in zip(self.level_cells, self.sizes, self.sizes[1:], strict=False):
            table = table[parents(self.batch, coarse, fine, self.device)].flatten(1)
            table[new] = torch.arange(first, first + new.shape[0], device=self.device)[:, None]
            first += new.shape[0]
        return table

    def rows_at(self, other: SiteLayout, cells: Tensor | None = None) -> Tensor | None:
        """`[N]` int64: our row at each site of `other`; None where both are the same.

        Args:
            cells: flat cells of its grid; by default all that have a site.

        Raises:
            ValueError: `other` has a site where this layout has none, or a stride that does not fit.
        """
        if other is self and cells is None:
            return None
        if other.stride % self.stride:
            raise ValueError(f"stride {other.stride} of the next layout is no multiple of {self.stride}")
        step = other.stride // self.stride
        batch, y, x = unflatten(other.cells if cells is None else cells, other.size)
        rows = self.site[batch, y * step, x * step]
        if bool((rows < 0).any()):
            raise ValueError("the next stage's layout has sites that this stage's layout lacks")
        return rows

    def rows_of_cells(self, other: SiteLayout) -> Tensor:
        """`[other.num_sites]` int64: our row at each site of `other`, a layout of our stride or a finer one;
        -1 where we have no site."""
        step = self.stride // other.stride
        batch, y, x = unflatten(other.cells, other.size)
        rows = self.site[batch, y // step, x // step]
        return rows.where((y % step == 0) & (x % step == 0), -1)

    def neighbours(
        self, other: SiteLayout, spacing: int, exchange: str = "linear", lattice: bool = False
    ) -> NeighbourTable:
        """Our rows around the extra sites of `other`, `spacing` px apart (cached); see `neighbours_of_cells`.

        lattice: the table has the sites of the lattice too, in front.

        Raises:
            ValueError: different finest grids, or as `neighbours_of_cells`.
        """
        if (other.size, other.stride) != (self.size, self.stride):
            raise ValueError(
                f"layouts differ in their finest grid: {self.size} at stride {self.stride}, "
                f"{other.size} at stride {other.stride}"
            )
        tables = self._tables.setdefault(other, {})
        key = spacing, exchange, lattice
        if key not in tables:
            cells = other.cells[0 if lattice else other.num_lattice :]
            tables[key] = self.neighbours_of_cells(cells, spacing, exchange)
        return tables[key]

    def known_tables(self, other: SiteLayout) -> list[tuple[int, str, bool]]:
        """The arguments `spacing, exchange, lattice` of the tables of `neighbours` built so far."""
        return list(self._tables.get(other, {}))

    def cached(self, key: Hashable, build: Callable[[], _T]) -> _T:
        """What an engine derives from this layout, built at the first call with `key` and kept with us."""
        if key not in self._cache:
            self._cache[key] = build()
        return self._cache[key]

    def neighbours_of_cells(self, cells: Tensor, spacing: int, exchange: str = "linear") -> NeighbourTable:
        """Our rows around flat cells int64 `[M]` of the finest grid, taps `spacing` px apart.

        exchange: what stands where we have no site: `linear`, the lattice's bilinear interpolation;
        `nearest`, the block's own site; `none`, zero; `separate`, zero, also for sites of another level than
        the cell's. Outside the image it is zero.

        Raises:
            ValueError: unknown exchange, or a spacing that is no multiple of our stride.
        """
        if exchange not in EXCHANGES:
            raise ValueError(f"unknown exchange {exchange!r}; choose one of {', '.join(EXCHANGES)}")
        height, width = self.size
        step = cells_apart(spacing, self.stride)
        steps = torch.arange(-step, step + 1, step, device=self.device)  # taps along an axis
        _, y, x = (place[:, None] + steps for place in unflatten(cells, self.size))
        inside = (((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]).flatten(1)
        shifts = (steps[:, None] * width + steps).flatten()
        own, cells = cells[:, None], (cells[:, None] + shifts).where(inside, 0)
        index = self.site.flatten()[cells].where(inside, -1)
        missing = inside & (index < 0)
        if exchange in ("none", SEPARATE):
            missing = torch.zeros_like(missing)
        if self.separates(exchange):
            level = self.level.flatten()
            index = index.where(level[cells] == level[own], -1)

        needed = torch.zeros(self.batch * height * width, dtype=torch.bool, device=self.device)
        needed[cells[missing]] = True
        ghost_cells = needed.nonzero().squeeze(1)
        ghost_of_cell = needed.cumsum(0) - 1
        if exchange == "nearest":
            ghosts = self.owner.flatten()[ghost_cells, None]
        else:
            ghosts = self.interpolation[ghost_cells]
        zero = self.num_sites + ghost_cells.shape[0]
        ghost = (self.num_sites + ghost_of_cell[cells]).where(missing, zero)
        index = index.where(index >= 0, ghost)
        return NeighbourTable(index, inside, ghosts, ghost_cells, self.num_sites)

    def __repr__(self) -> str:
        return (
            f"SiteLayout(batch={self.batch}, size={self.size}, stride={self.stride}, "
            f"lattice={self.num_lattice} at stride {self.lattice_stride}, extra={self.num_extra})"
        )
