"""The sites of a pass: which cells are split at each level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparse_seg.sites.apart import Apart
from sparse_seg.sites.level import SEPARATE, Level
from sparse_seg.sites.plan import LevelPlan, Taps


class Sites:
    """The levels of a mask.

    Args:
        levels: by stride, coarsest first.
        exchange: see `Level`.
        apart: of exchange rule `separate`, which is `none` without what `Apart` leaves out.
        engine: what computes convolutions at extra sites: `gather`; `spconv`, the 3x3 ones; `triton`, see
            `triton.py`; or `auto`, which is gather.
    """

    def __init__(
        self, levels: dict[int, Level], exchange: str, apart: Apart | None = None, engine: str = "gather"
    ) -> None:
        self.levels, self.exchange, self.apart, self.engine = levels, exchange, apart, engine
        self._whole: Sites | None = None

    @classmethod
    def of_mask(
        cls,
        fine_blocks: Tensor,
        plans: dict[int, LevelPlan],
        exchange: str,
        near: Mapping[int, Sequence[Taps]],
        before: Sites | None = None,
        engine: str = "gather",
        count: int | None = None,
    ) -> Sites:
        """From block levels int64 `[B, Hc, Wc]`: 0 keeps a block coarse, each more halves its stride.

        Args:
            plans: of the levels, by stride, coarsest first.
            exchange: see `Level`; or `separate`, see `Apart`.
            near: see `Level`, by stride.
            before: the sites of the step before, all of them sites of this one; only new ones are run. Not
                under `separate`.
            count: of the split blocks, with two strides, where it is known: nothing waits for a device.
        """
        levels, separates = {}, exchange == SEPARATE
        exchange = "none" if separates else exchange
        for number, (stride, plan) in enumerate(plans.items()):
            split = fine_blocks > number
            if number:
                split = split.repeat_interleave(2**number, 1).repeat_interleave(2**number, 2)
                split = split[:, : plan.coarse[0], : plan.coarse[1]]
            if count is None:
                cells, new = split.flatten().nonzero().squeeze(1), None
            else:  # the split ones first, in order; nonzero_static came to CUDA late
                cells, new = split.flatten().byte().argsort(descending=True, stable=True)[:count], None
            if before is not None:
                known = before.levels[stride].cells
                fresh = split.flatten().clone()
                fresh[known] = False
                added = fresh.nonzero().squeeze(1)
                cells, new = torch.cat([known, added]), added.shape[0]
            levels[stride] = Level(plan, cells, exchange, near.get(stride, ()), new)
        return cls(levels, exchange, Apart(levels) if separates else None, engine)

    @classmethod
    def of_numbers(
        cls,
        chosen: Tensor,
        fine: int,
        plans: dict[int, LevelPlan],
        exchange: str,
        near: Mapping[int, Sequence[Taps]],
        engine: str = "gather",
    ) -> Sites:
        """From block numbers int64 `[B, k]`, those at the finest stride first: shapes that do not depend on
        the numbers' values.

        Args:
            fine: how many of the k blocks are at the finest stride; with two strides all.
        """
        levels: dict[int, Level] = {}
        before = None
        for stride, plan in plans.items():
            batch, counts = plan.batch, None
            if before is None:
                cells = chosen
                if batch > 1:
                    first = torch.arange(batch, device=chosen.device)[:, None] * (plan.cells // batch)
                    cells = cells + first
                blocks = cells[:, :fine]
            else:
                children = before.fine_of_phases.index_select(1, blocks.reshape(-1))
                if not before.is_even:  # one beyond the border has no sites: the block's first stands there
                    counts = (children < before.fine_cells).reshape(4, batch, -1).permute(1, 0, 2).reshape(-1)
                    children = children.where(children < before.fine_cells, children[:1])
                cells = children.reshape(4, batch, -1).permute(1, 0, 2).reshape(batch, -1)
                blocks = cells
            levels[stride] = Level(plan, cells.reshape(-1), exchange, near.get(stride, ()), counts=counts)
            before = plan
        return cls(levels, exchange, engine=engine)

    @property
    def whole(self) -> Sites:
        """These sites, all of them to be run."""
        levels = self.levels.items()
        if all(level.run == level.count for _, level in levels):
            return self
        if self._whole is None:  # not functools.cached_property: its lock is beyond torch.compile
            whole = {one: Level(level.plan, level.cells, level.exchange, level.near) for one, level in levels}
            self._whole = Sites(whole, self.exchange, engine=self.engine)
        return self._whole
