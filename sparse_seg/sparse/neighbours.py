"""Who is whose neighbour: what the nine taps of a 3x3 convolution read around each extra site."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TAPS = 9  # of a 3x3 kernel, in (ky, kx) order
# Taps that the image border cuts off are left out of the products from this share of all taps on: ASPP's far
# taps; the few of a residual stage would only make small products.
_MIN_OUTSIDE = 0.1


@dataclass(frozen=True, eq=False)
class TapGroup:
    """Extra sites of which the same taps, a box of the kernel, lie inside the image.

    sites:  `[m]` int64, which of the table's extra sites; None for all of them in order.
    ky, kx: the box, `[first, last)` along each axis.
    index:  `[m, T]` int64, what each tap in the box reads, as in the table.
    """

    sites: Tensor | None
    ky: tuple[int, int]
    kx: tuple[int, int]
    index: Tensor

    def tiles(self, max_sites: int) -> Iterator[slice]:
        """The group's sites in tiles of equal size, of at most `max_sites`."""
        sites = self.index.shape[0]
        tile = math.ceil(sites / math.ceil(sites / max_sites))
        for first in range(0, sites, tile):
            yield slice(first, min(first + tile, sites))

    def weight_blocks(self, weight: Tensor) -> list[tuple[slice, Tensor]]:
        """Views `[O, K]` of a KRSC weight for the box's taps, each with its columns of a gathered tile."""
        (top, bottom), (left, right) = self.ky, self.kx
        if right - left == 3:
            block = weight[:, top:bottom].flatten(1)
            return [(slice(0, block.shape[1]), block)]
        blocks = [weight[:, y, left:right].flatten(1) for y in range(top, bottom)]
        width = blocks[0].shape[1]
        return [(slice(i * width, (i + 1) * width), block) for i, block in enumerate(blocks)]


@dataclass(frozen=True, eq=False)
class NeighbourTable:
    """The 3x3 neighbours of the extra sites of one layout among N rows of another, G ghosts, and zero.

    index:       `[M, 9]` int64. A row from 0 on, a ghost from N on, or N + G for zero.
    inside:      `[M, 9]` bool. Whether the tap lies inside the image.
    ghosts:      `[G, R]` int64. A ghost is the mean of these R rows (repeats stand for weights).
    ghost_cells: `[G]` int64, ascending. The flat cell of the finest grid where a ghost stands.
    num_rows:    N.
    """

    index: Tensor
    inside: Tensor
    ghosts: Tensor
    ghost_cells: Tensor
    num_rows: int

    @property
    def num_ghosts(self) -> int:
        return self.ghosts.shape[0]

    @cached_property
    def groups(self) -> list[TapGroup]:
        """The extra sites by the taps that lie inside the image; one group of all where nearly all do."""
        if not self.index.shape[0]:
            return []
        if self.inside.float().mean() > 1 - _MIN_OUTSIDE:
            return [TapGroup(None, (0, 3), (0, 3), self.index)]
        inside = self.inside.view(-1, 3, 3)
        # the taps inside the image are a box around the kernel's centre: its four sides tell all
        sides = torch.stack((inside[:, 0, 1], inside[:, 2, 1], inside[:, 1, 0], inside[:, 1, 2]), 1)
        boxes, box_of_site = sides.unique(dim=0, return_inverse=True)
        groups = []
        for number, (up, down, left, right) in enumerate(boxes.tolist()):
            sites = (box_of_site == number).nonzero().squeeze(1)
            ky, kx = (1 - up, 2 + down), (1 - left, 2 + right)
            index = self.index.view(-1, 3, 3)[sites, ky[0] : ky[1], kx[0] : kx[1]].flatten(1)
            groups.append(TapGroup(sites, ky, kx, index))
        return groups
