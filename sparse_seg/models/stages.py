"""The backbone's stages in one pass: each runs once for a step, whoever asks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from sparse_seg.models.layouts import dense_layout, dense_strides
from sparse_seg.models.network import Network
from sparse_seg.models.way import Way
from sparse_seg.sparse import Memory, SiteLayout, Step, rows_to_grid

Count = tuple[str, Callable[[], int]]  # a part's name, and what gives its multiply-adds


class Stages:
    """Which steps the stages of a network have run over images, and their rows.

    Args:
        model: whose stages they are.
        images: see `Pass`.
    """

    def __init__(self, model: Network, images: Tensor) -> None:
        self.model, self.images = model, images
        self.done: list[Step] = []  # of the stages that have run
        self.rows: list[Tensor] = []  # of each of them
        self._dense: dict[int, Step] = {}  # by stride: stages that ways have in common run once

    def dense_step(self, stride: int) -> Step:
        """Of a dense network's stage at a stride, px."""
        if stride not in self._dense:
            self._dense[stride] = Step(dense_layout(self.images, stride))
        return self._dense[stride]

    def dense(self, stride: int) -> list[Step]:
        """Of the dense network at an output stride, px."""
        return [self.dense_step(one) for one in dense_strides(stride)]

    def early(self) -> list[Step]:
        """Of the stages that no mask decides."""
        return self.dense(self.model.strides[0])[: self.model.first_selective]

    def late(
        self,
        layouts: Sequence[SiteLayout],
        before: Sequence[SiteLayout | None],
        way: Way,
        memory: Memory | None,
    ) -> list[Step]:
        """Of the stages that a mask decides; those that share a layout share its step.

        Args:
            layouts: of all stages; before: of the step before, see `Step`.
        """
        steps: dict[SiteLayout, Step] = {}
        first = self.model.first_selective
        for layout, old in zip(layouts[first:], before[first:], strict=True):
            if layout not in steps:
                steps[layout] = Step(layout, memory, old, way.exchange, way.engine)
        return [steps[layout] for layout in layouts[first:]]

    def run(self, steps: Sequence[Step]) -> list[Count]:
        """Run these steps but for those at the front that have run; gives the multiply-adds of what ran."""
        known = 0
        while known < min(len(steps), len(self.done)) and steps[known] is self.done[known]:
            known += 1
        if known == len(steps):
            return []
        backbone, src = self.model.backbone, steps[max(known - 1, 0)]
        refines = not steps[known].runs_lattice
        if refines:  # the stage before has nothing new
            src = Step(src.layout, before=src.layout)
        rows = self.rows[known - 1] if known else backbone.stem(self.images)
        late = backbone.run_stages(rows[:0] if refines else rows, steps[known:], known, src)
        self.rows, self.done = [*self.rows[:known], *late], list(steps)
        counts = list[Count]()
        if not known:
            batch, _, height, width = self.images.shape
            counts.append(("stem", lambda: backbone.stem_macs((height, width), batch)))
        for stage, step in list(zip(backbone.stages, steps, strict=False))[known:]:
            counts.append((stage.name, functools.partial(stage.module.macs, src, step)))
            src = step
        return counts

    def low_level(self) -> Tensor | None:
        """The first stage's grid `[B, C, H, W]`, for a head that reads it."""
        if not self.model.head.reads_low_level:
            return None
        layout = self.done[0].layout
        return rows_to_grid(self.rows[0], layout.batch, layout.size)
