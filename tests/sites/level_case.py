"""A level with random values, and a slow reference of what a convolution gives at its extra sites."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_seg.sites import Level, LevelPlan, Taps, spconv, triton
from tests.reference import block_mask
from tests.slow_reference import SlowSites, slow_conv


def taps(spacing: int) -> Taps:
    return Taps((-spacing, 0, spacing), (-spacing, 0, spacing))


class Case:
    """A level at stride 8 with random values, and what a convolution gives at its extra sites."""

    def __init__(
        self, kind: str = "random", size: tuple[int, int] = (9, 13), exchange: str = "linear",
        device: str = "cpu", channels: tuple[int, int] = (8, 16),
    ) -> None:  # fmt: skip
        self.mask = block_mask(kind, (2, -(-size[0] // 2), -(-size[1] // 2)))
        plan = LevelPlan(2, (8 * size[0] - 3, 8 * size[1]), 8, device)
        self.level = Level(plan, self.mask.flatten().nonzero().squeeze(1).to(device), exchange)
        self.slow, self.exchange = SlowSites(2, size, [self.mask]), exchange
        generator = torch.Generator().manual_seed(0)
        self.grid = torch.randn(2, channels[0], *size, generator=generator)
        self.weight = torch.randn(channels[1], channels[0], 3, 3, generator=generator).to(device)
        self.source = self._rows(self.grid[:, :, ::2, ::2]).to(device)
        places = plan.fine_of_phases[1:].index_select(1, self.level.cells).reshape(-1)
        self.places, flat = places, self._rows(self.grid).to(device)
        self.extras = torch.cat([flat, flat.new_full((1, channels[0]), torch.nan)])[places]

    @staticmethod
    def _rows(grid: Tensor) -> Tensor:
        return grid.permute(0, 2, 3, 1).flatten(0, 2)

    def found(self, spacing: int = 16, bias: Tensor | None = None) -> Tensor:
        out = spconv.level_conv2d(self.level, taps(spacing), self.source, self.extras, self.weight, bias)
        return out[self.places < self.level.plan.fine_cells]

    def by_triton(self, spacing: int = 16, bias: Tensor | None = None) -> Tensor:
        """The same by the other engine."""
        level, source = self.level, None if self.exchange == "none" else self.source
        index = level.tap_rows(taps(spacing))
        out = triton.conv2d(self.extras, index, self.weight, bias, source, level)
        assert out is not None, triton.problem(self.extras.device, self.extras.dtype)
        return out[self.places < level.plan.fine_cells]

    def expected(self, spacing: int = 16) -> Tensor:
        rows, weight = self.slow.read(self.grid.double()), self.weight.double().cpu()
        out = slow_conv(rows, weight, self.slow, self.slow, spacing // 8, self.exchange)
        height, width = self.slow.size
        row_of = {(b * height + y) * width + x: n for n, (b, y, x) in enumerate(self.slow.cells)}
        inside = self.places[self.places < self.level.plan.fine_cells]
        return out[[row_of[place] for place in inside.tolist()]].float().to(self.weight.device)
