"""Sites with random values, what the engines' convolutions give there, and a slow reference of it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_seg.ops import OPERATORS, Node, Reads, Spatial
from sparse_seg.sites import Grid, Level, LevelPlan, Mixed, Sites, Taps, spconv, triton
from tests.slow_reference import SlowSites, slow_conv

ENTRY, NEAR, FAR = 0, 1, 3  # a window of a complete grid; and of rows, so many lattice cells between its taps


class Rows:
    """Random sites on one or two levels over a grid of `size` at 8 px, and the slow ones.

    Rows are read from a complete grid `[2, C, *size]`, so that both sides have the same leaf; extra sites
    beyond the border, which no place may read, are NaN.

    Args:
        fraction: of blocks that are split, `last`: the last alone; None: at random into levels.
    """

    def __init__(
        self, size: tuple[int, int], levels: int = 1, exchange: str = "linear", seed: int = 0,
        device: str = "cpu", fraction: float | str | None = None,
    ) -> None:  # fmt: skip
        self.exchange, self.base = exchange, 8 * 2**levels
        strides = [8 * 2**level for level in reversed(range(levels))]
        plans = {stride: LevelPlan(2, (8 * size[0] - 3, 8 * size[1]), stride, device) for stride in strides}
        generator, shape = torch.Generator().manual_seed(seed), (2, *plans[strides[0]].coarse)
        blocks = torch.randint(0, levels + 1, shape, generator=generator)
        if fraction == "last":
            blocks = torch.zeros(shape, dtype=torch.int64)
            blocks[:, -1, -1] = 1
        elif isinstance(fraction, float):
            blocks = (torch.rand(shape, generator=generator) < fraction).long()
        near = {stride: [self.taps(NEAR)] for stride in strides}
        self.sites = Sites.of_mask(blocks.to(device), plans, exchange, near)
        splits = []
        for number, plan in enumerate(plans.values()):
            split = blocks.repeat_interleave(2**number, 1).repeat_interleave(2**number, 2) > number
            splits.append(split[:, : plan.coarse[0], : plan.coarse[1]])
        self.slow = SlowSites(2, size, splits)

    def taps(self, window: int) -> Taps:
        apart = self.base * max(window, 1)
        return Taps((-apart, 0, apart), (-apart, 0, apart))

    def mixed(self, grid: Tensor) -> Mixed:
        step, flat = self.base // 8, grid.permute(0, 2, 3, 1).flatten(0, 2)
        flat = torch.cat([flat, flat.new_full((1, flat.shape[1]), torch.nan)])
        rows = {stride: flat[self.finest(stride)] for stride in self.sites.levels}
        return Mixed(Grid(grid[:, :, ::step, ::step], self.base), rows, self.sites)

    def conv(
        self, window: int, grid: Tensor, weight: Tensor, bias: Tensor | None = None, *, engine: str = "gather"
    ) -> Tensor:
        """What a 3x3 convolution gives at all extra sites inside the image, `[N, O]`."""
        mixed, found = self.mixed(grid), []
        for stride in self.sites.levels:
            out = self._conv(stride, window, grid, mixed, weight, bias, engine)
            found.append(out[self.finest(stride) < grid[:, 0].numel()])
        return torch.cat(found)

    def _conv(
        self, stride: int, window: int, grid: Tensor, mixed: Mixed, weight: Tensor, bias: Tensor | None,
        engine: str,
    ) -> Tensor:  # fmt: skip
        level, taps = self.sites.levels[stride], self.taps(window)
        if engine == "spconv":
            source, extras = mixed.complete(2 * stride), mixed.extras(stride)
            return spconv.level_conv2d(level, taps, source, extras, weight, bias)
        if engine == "triton":
            rows, index, source_of_ghosts = mixed.reads_apart(stride, taps)
            out = triton.conv2d(rows, index, weight, bias, source_of_ghosts, level)
            assert out is not None, triton.problem(rows.device, rows.dtype)
            return out
        node = Node("conv", "conv2d", options={"kernel": [3, 3], "groups": grid.shape[1] // weight.shape[1]})
        operator = OPERATORS["conv2d"]
        assert isinstance(operator, Spatial)
        if window == ENTRY:
            table, index, shares = Grid(grid, 8).table, level.grid_rows(taps, 8), None
        else:
            table, index, shares = mixed.reads(stride, taps)
        reads = Reads(table.rows, index, taps.number, table.make, table.parts, shares)
        return operator.rows(node, {"weight": weight}, reads)

    def slow_conv(self, window: int, grid: Tensor, weight: Tensor) -> Tensor:
        """The same from the rebuilt grid."""
        groups, inside = grid.shape[1] // weight.shape[1], weight.shape[1]
        each, full = len(weight) // groups, weight.new_zeros(len(weight), grid.shape[1], 3, 3)
        for group, part in enumerate(weight.split(each)):  # as a kernel over all channels
            full[group * each : (group + 1) * each, group * inside : (group + 1) * inside] = part
        source = SlowSites(2, self.slow.size) if window == ENTRY else self.slow
        apart = self.taps(window).reach
        out = slow_conv(source.read(grid), full, source, self.slow, apart // 8, self.exchange)
        height, width = self.slow.size
        row = {(b * height + y) * width + x: n for n, (b, y, x) in enumerate(self.slow.cells)}
        places = torch.cat([self.finest(stride) for stride in self.sites.levels]).tolist()
        return out[[row[place] for place in places if place < 2 * height * width]]

    def finest(self, stride: int) -> Tensor:
        """`[3 * K]`: the cells of the finest grid where a level's extra sites stand; the last one outside."""
        level, (height, width), step = self.sites.levels[stride], self.slow.size, stride // 8
        plan = level.plan
        places = plan.fine_of_phases[1:].index_select(1, level.cells).reshape(-1)
        image, y, x = torch.unravel_index(places.clamp(max=plan.fine_cells - 1), (2, *plan.fine))
        finest = (image * height + y * step) * width + x * step
        return finest.where(places < plan.fine_cells, 2 * height * width)


class Case(Rows):
    """Float32 values and weights on one level, for an engine."""

    def __init__(
        self, engine: str, size: tuple[int, int] = (9, 13), exchange: str = "linear", device: str = "cpu",
        fraction: float | str = 0.35, channels: tuple[int, int] = (8, 16),
    ) -> None:  # fmt: skip
        super().__init__(size, 1, exchange, 0, device, fraction)
        self.engine, generator = engine, torch.Generator().manual_seed(0)
        self.grid = torch.randn(2, channels[0], *size, generator=generator).to(device)
        self.weight = torch.randn(channels[1], channels[0], 3, 3, generator=generator).to(device)

    @property
    def level(self) -> Level:
        return self.sites.levels[8]

    def found(self, window: int = NEAR, bias: Tensor | None = None) -> Tensor:
        return self.conv(window, self.grid, self.weight, bias, engine=self.engine)

    def expected(self, window: int = NEAR) -> Tensor:
        """In float64."""
        return self.slow_conv(window, self.grid.double().cpu(), self.weight.double().cpu()).to(self.grid)
