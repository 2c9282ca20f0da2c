"""Index tables of a level for a fixed image size: which places its cells have, and who neighbours whom.

A level adds *extra* sites at stride t to cells of the grid at 2t that it splits: phases 1, 2 and 3 of a
cell lie to its right, below, and diagonally below; phase 0 is the cell's own site. Cells are numbered over
the whole batch, image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))  # (y, x) of phases 0 to 3 in a cell
# where there is no site, phases 1 to 3 are this mean of their cell and the ones right, below, and diagonal
MIX = ((0.5, 0.5, 0.0, 0.0), (0.5, 0.0, 0.5, 0.0), (0.25, 0.25, 0.25, 0.25))


class LevelPlan(nn.Module):
    """Constants of a level: int64 buffers, each made at its first use.

    Args:
        batch: number of images.
        fine: `(H, W)` of the grid at the level's own stride.
        ragged: whether lists of split cells may name the cell `cells`, which is none: such an entry makes
            rows that nothing reads.

    The number `outside` stands for all that lies outside the image.
    """

    corners: Tensor
    mix: Tensor

    def __init__(self, batch: int, fine: tuple[int, int], ragged: bool = False) -> None:
        super().__init__()
        self.batch, self.fine, self.ragged = batch, fine, ragged
        self.coarse = ((fine[0] + 1) // 2, (fine[1] + 1) // 2)
        self.area = self.coarse[0] * self.coarse[1]
        self.cells = batch * self.area
        self.outside = self.cells + ragged
        y, x = places(self.coarse)
        right, below = (x + 1).clamp(max=self.coarse[1] - 1), (y + 1).clamp(max=self.coarse[0] - 1)
        around = [(y, x), (y, right), (below, x), (below, right)]
        corners = torch.stack([self._number(*place, self.coarse, self.cells) for place in around])
        self.register_buffer("corners", corners, persistent=False)
        self.register_buffer("mix", torch.tensor(MIX), persistent=False)

    def neighbours(self, step: int) -> Tensor:
        """`[3, cells, 9]`: what the taps of phases 1, 2, 3 read that lie `step` cells apart.

        In numbers `(phase - 1) * outside + cell`; `3 * outside` is outside.
        """

        def build() -> Tensor:
            y, x = _taps(self.coarse, step)
            tables = []
            for index, (down, right) in enumerate(PHASES[1:]):
                inside = _inside(y, x, self.coarse) & _inside(2 * y + down, 2 * x + right, self.fine)
                cells = self._number(y, x, self.coarse, self.outside, inside)
                tables.append((cells + index * self.outside).where(cells < self.outside, 3 * self.outside))
            return torch.stack(tables)

        return self._kept(f"neighbours_{step}", build)

    def around(self, steps: Sequence[int]) -> Tensor:
        """`[cells, 9 * len(steps)]`: the cells each of these numbers of steps away."""

        def build() -> Tensor:
            taps = [_taps(self.coarse, step) for step in steps]
            tables = [
                self._number(y, x, self.coarse, self.outside, _inside(y, x, self.coarse)) for y, x in taps
            ]
            return torch.cat(tables, 1)

        return self._kept("around_" + "_".join(map(str, steps)), build)

    def patches(self, step: int) -> Tensor:
        """`[3, cells, 9]`: cells of the fine grid around phases 1, 2, 3 of each cell, `step` of them
        apart."""

        def build() -> Tensor:
            tables = []
            for phase in PHASES[1:]:
                y, x = _taps(self.coarse, step, 2, phase)
                tables.append(self._number(y, x, self.fine, self._fine_cells, _inside(y, x, self.fine)))
            return torch.stack(tables)

        return self._kept(f"patches_{step}", build)

    def surroundings(self, step: int) -> Tensor:
        """`[4, cells, 9]`: as `patches`, around phases 0 to 3, in numbers `phase * outside + cell`; `4 *
        outside` is outside."""

        def build() -> Tensor:
            numbers = torch.cat([self.places, torch.tensor([4 * self.outside])])
            tables = []
            for phase in PHASES:
                y, x = _taps(self.coarse, step, 2, phase)
                cells = self._number(y, x, self.fine, self._fine_cells, _inside(y, x, self.fine))
                tables.append(numbers[cells])
            return torch.stack(tables)

        return self._kept(f"surroundings_{step}", build)

    @property
    def places(self) -> Tensor:
        """`[fine cells]`: `phase * outside + cell` of each cell of the fine grid."""

        def build() -> Tensor:
            y, x = places(self.fine)
            cell = self._number(y // 2, x // 2, self.coarse, self.outside)[: self._fine_cells]
            return (2 * (y % 2) + x % 2).repeat(self.batch) * self.outside + cell

        return self._kept("places_of_phases", build)

    @property
    def phase_cells(self) -> Tensor:
        """`[4, cells]`: the fine cell of each cell's phases 0 to 3; one beyond the last if it lies
        outside."""

        def build() -> Tensor:
            y, x = places(self.coarse)
            fine = [(2 * y + down, 2 * x + right) for down, right in PHASES]
            numbers = [
                self._number(*place, self.fine, self._fine_cells, _inside(*place, self.fine))
                for place in fine
            ]
            return torch.stack(numbers)

        return self._kept("children_of_cells", build)

    @property
    def inside(self) -> Tensor:
        """`[3, cells]` float: 1 where phases 1, 2, 3 of a cell lie inside the image, otherwise 0."""
        return self._kept("inside_image", lambda: (self.phase_cells[1:] < self._fine_cells).float())

    @property
    def _fine_cells(self) -> int:
        return self.batch * self.fine[0] * self.fine[1]

    def _kept(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        if name not in self._buffers:
            self.register_buffer(name, build(), persistent=False)
        return getattr(self, name)

    def _number(
        self, y: Tensor, x: Tensor, size: tuple[int, int], outside: int, inside: Tensor | None = None
    ) -> Tensor:
        """Places `[n, ...]` of one image as numbers `[B * n, ...]`; with one more of nowhere if `ragged`."""
        cell = y * size[1] + x
        images = torch.stack([cell + image * size[0] * size[1] for image in range(self.batch)])
        if inside is not None:
            images = images.where(inside, outside)
        numbers = images.flatten(0, 1)
        if self.ragged:
            none = numbers.new_full((1, *numbers.shape[1:]), 0 if inside is None else outside)
            numbers = torch.cat([numbers, none])
        return numbers


def places(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows and columns of a grid's cells, `[H * W]` each."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return y.flatten(), x.flatten()


def _taps(
    size: tuple[int, int], step: int, scale: int = 1, shift: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """`[cells, 9]` each: rows and columns `step` apart around `scale * cell + shift`."""
    y, x = places(size)
    taps = torch.arange(-1, 2) * step
    rows = (scale * y + shift[0])[:, None] + taps.repeat_interleave(3)
    return rows, (scale * x + shift[1])[:, None] + taps.repeat(3)


def _inside(y: Tensor, x: Tensor, size: tuple[int, int]) -> Tensor:
    return (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
