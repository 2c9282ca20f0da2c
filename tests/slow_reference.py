"""Sites by loops over cells, and a convolution at them by plain `F.conv2d` on the whole grid."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])


def once(method: Method) -> Method:
    """A method that remembers its results, as long as its object lives."""

    @functools.wraps(method)
    def look_up(self: Any, *key: Any) -> Any:
        memory = self.__dict__.setdefault(f"_{method.__name__}", {})
        if key not in memory:
            memory[key] = method(self, *key)
        return memory[key]

    return cast(Method, look_up)


class SlowSites:
    """Sites of nested levels, by loops over cells: the order of rows, and what stands where no site is."""

    def __init__(self, batch: int, size: tuple[int, int], splits: Sequence[Tensor] = ()) -> None:
        self.batch, self.size, self.sizes = batch, size, [size]
        for _ in splits:
            self.sizes.insert(0, (-(-self.sizes[0][0] // 2), -(-self.sizes[0][1] // 2)))
        cells = _all_cells(batch, self.sizes[0])
        self.rows_of = [{cell: row for row, cell in enumerate(cells)}]  # per level: cell -> row
        self.splits = [split.tolist() for split in splits]
        for split, coarse, fine in zip(self.splits, self.sizes, self.sizes[1:], strict=False):
            last = self.rows_of[-1]
            rows = {(b, 2 * y, 2 * x): row for (b, y, x), row in last.items()}
            for b, y, x in _all_cells(batch, coarse):
                assert not split[b][y][x] or (b, y, x) in last
                for dy, dx in ((0, 1), (1, 0), (1, 1)) if split[b][y][x] else ():
                    if 2 * y + dy < fine[0] and 2 * x + dx < fine[1]:
                        rows[b, 2 * y + dy, 2 * x + dx] = len(rows)
            self.rows_of.append(rows)

    @property
    def cells(self) -> list[tuple[int, int, int]]:
        """The finest cell (b, y, x) of each row, in row order."""
        return sorted(self.rows_of[-1], key=self.rows_of[-1].__getitem__)

    def owner(self, cell: tuple[int, int, int], level: int = -1) -> int:
        """The row of the cell's own site, or else of its block's."""
        level %= len(self.rows_of)
        b, y, x = cell
        own = self.rows_of[level].get(cell)
        return own if own is not None else self.owner((b, y // 2, x // 2), level - 1)

    def level(self, cell: tuple[int, int, int]) -> int:
        """How many of the splits the finest cell's block has gone through."""
        b, y, x = cell
        last = len(self.splits)
        return sum(s[b][y >> last - n][x >> last - n] for n, s in enumerate(self.splits))

    def bilinear(self, cell: tuple[int, int, int], level: int = -1) -> dict[int, float]:
        """Row -> weight: the cell's own site, or the mean of the 2 or 4 around it on the level above."""
        level %= len(self.rows_of)
        if cell in self.rows_of[level]:
            return {self.rows_of[level][cell]: 1.0}
        b, y, x = cell
        height, width = self.sizes[level - 1]
        ys = [v for v in {y // 2, (y + 1) // 2} if v < height]
        xs = [v for v in {x // 2, (x + 1) // 2} if v < width]
        weights: dict[int, float] = {}
        for v, u in product(ys, xs):
            for row, weight in self.bilinear((b, v, u), level - 1).items():
                weights[row] = weights.get(row, 0.0) + weight / (len(ys) * len(xs))
        return weights

    @once
    def rebuild_matrix(self, exchange: str) -> Tensor:
        """`[B*H*W, N]` float64, sparse: rows to the whole grid, cells without a site by the exchange rule."""
        places = _all_cells(self.batch, self.size)
        matrix = torch.zeros(len(places), len(self.rows_of[-1]), dtype=torch.float64)
        for place, cell in enumerate(places):
            if exchange == "linear" or cell in self.rows_of[-1]:
                for row, weight in self.bilinear(cell).items():
                    matrix[place, row] = weight
            elif exchange == "nearest":
                matrix[place, self.owner(cell)] = 1
        return matrix.to_sparse()

    def rebuild(self, rows: Tensor, exchange: str) -> Tensor:
        """Rows `[N, C]` to the whole grid `[B, C, H, W]`."""
        grid = torch.sparse.mm(self.rebuild_matrix(exchange).to(rows), rows)
        return grid.view(self.batch, *self.size, rows.shape[1]).permute(0, 3, 1, 2)

    def read(self, grid: Tensor) -> Tensor:
        """`[B, C, H, W]` to rows `[N, C]`."""
        b, y, x = self._places.to(grid.device)
        return grid[b, :, y, x]

    @functools.cached_property
    def _places(self) -> Tensor:
        return torch.tensor(self.cells).T


def _all_cells(batch: int, size: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Every (b, y, x) of a grid, row-major."""
    return list(product(range(batch), range(size[0]), range(size[1])))


def slow_conv(
    rows: Tensor, weight: Tensor, src: SlowSites, dst: SlowSites, dilation: int, exchange: str
) -> Tensor:
    """Rebuild the whole grid of `src`, convolve it densely (weight OIHW), read the sites of `dst`.

    With `separate`, once for each level of `src`: on a grid of its sites alone, read where that level is.
    """

    def conv(rows: Tensor) -> Tensor:
        return dst.read(F.conv2d(src.rebuild(rows, exchange), weight, None, 1, dilation, dilation))

    if exchange != "separate":
        return conv(rows)
    own, asked = (torch.tensor([src.level(cell) for cell in sites.cells])[:, None] for sites in (src, dst))
    return sum(conv(rows * (own == n)) * (asked == n) for n in range(len(src.sizes)))  # type: ignore[return-value]
