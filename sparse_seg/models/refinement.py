"""Coarse first, refine later (P4 of docs/method.md): a coarse pass, then only the sites that a mask adds.

The first result is the dense network at the coarsest stride. What its 3x3 convolutions read is kept, so a
step runs its new sites alone; earlier ones keep their values. After a step the logits are those of the
one-shot pass with the same mask (with several steps, but for new sites next to older ones: those were
computed from the exchange rule's values and are not computed again).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparse_seg.masks import ConfidencePolicy, block_levels, blur_scores, top_blocks
from sparse_seg.sparse import Memory, SiteLayout, StepLayout

if TYPE_CHECKING:
    from sparse_seg.models.segmentor import SelectiveSegmentor

FIRST_STEP, SMALLEST_STEP = 0.05, 0.01  # of all blocks, when steps are sized by time


def now(device: torch.device) -> float:
    """Seconds, when all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Refinement:
    """A coarse pass over images `[B, 3, H, W]` that can be refined.

    Args:
        model: in eval mode.
        dtype: what activations are kept in (float16 takes half the memory); None keeps them as they are.

    After each step `grid_logits` are the head's logits `[B, K, h, w]` on the last of `layouts`, `levels` the
    blocks' levels int64 `[B, Hc, Wc]`, and `memory.num_bytes` the size of what is kept.

    Raises:
        ValueError: the model is in training mode or has undilated convolutions, or images of a wrong shape.
    """

    @torch.no_grad()
    def __init__(self, model: SelectiveSegmentor, images: Tensor, dtype: torch.dtype | None = None) -> None:
        if model.training:
            raise ValueError("call model.eval() before refining: batch statistics would depend on the step")
        if model.has_undilated:
            raise ValueError(
                "undilated convolutions make the coarse pass depend on the mask: it cannot be refined"
            )
        self.model, self.images, self.memory = model, images, Memory(dtype)
        layouts = model.dense_layouts(images, model.strides[-1])
        self._first = model.first_selective
        self.layouts = self._as_steps(layouts, [None] * len(layouts))
        self.levels = torch.zeros(
            images.shape[0], *layouts[-1].lattice_size, dtype=torch.int64, device=images.device
        )
        with model.precision(images):
            features = model.backbone(images, self.layouts)
            self._low_level = features[0]
            self.grid_logits = model.grid_logits(features, self.layouts)

    def fork(self) -> Refinement:
        """A run of its own from here: what either refines, the other does not see."""
        other = copy.copy(self)
        other.memory = self.memory.copy()
        return other

    @torch.no_grad()
    def refine(self, levels: Tensor) -> None:
        """Run the sites that `levels` (int64 or bool, as the model's `fine_blocks`) add.

        Raises:
            ValueError: a wrong shape or dtype, or a block that would become coarser.
        """
        layouts = self.model.selective_layouts(self.images, levels)
        levels = block_levels(levels, self.model.strides).to(self.images.device)
        if bool((levels < self.levels).any()):
            raise ValueError("a step can only refine: some block has a lower level than before")
        self.layouts, self.levels = self._as_steps(layouts, self.layouts), levels
        self.memory.start_step()
        backbone = self.model.backbone
        rows = self.images.new_empty(0, backbone.stage_channels[self._first - 1])  # the stage before has none
        with self.model.precision(self.images):
            features = backbone.run_stages(rows, self.layouts, self._first)
            self.grid_logits = self.model.grid_logits([self._low_level, *features], self.layouts)

    def _as_steps(
        self, layouts: Sequence[SiteLayout], before: Sequence[SiteLayout | None]
    ) -> list[SiteLayout]:
        """The layouts that the mask decides as steps; stages that share a layout go on sharing it."""
        steps: dict[SiteLayout, SiteLayout] = {}
        for layout, old in list(zip(layouts, before, strict=True))[self._first :]:
            if layout not in steps:
                steps[layout] = StepLayout(layout, self.memory, old)
        return [steps.get(layout, layout) for layout in layouts]

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Logits `[B, K, H, W]` at the images' size."""
        return self.model.upsample(self.grid_logits, self.images, self.layouts[-1])

    @torch.no_grad()
    def classes(self) -> Tensor:
        """Classes int64 `[B, H, W]`, for less than by `logits`."""
        return self.model.upsample_classes(self.grid_logits, self.images, self.layouts[-1])

    @torch.no_grad()
    def scores(self, policy: ConfidencePolicy) -> Tensor:
        """The policy's scores `[B, Hc, Wc]` of the logits as they are now."""
        return policy.logit_scores(
            self.model.upsample(self.grid_logits.float(), self.images, self.layouts[-1], policy.sample)
        )


class Step(NamedTuple):
    """A result: logits `[B, K, H, W]` and the blocks' levels int64 `[B, Hc, Wc]`."""

    logits: Tensor
    levels: Tensor


def refine(
    model: SelectiveSegmentor,
    images: Tensor,
    fractions: Sequence[float] | None = None,
    milliseconds: float | None = None,
) -> Iterator[Step]:
    """Results, better and better; see `SelectiveSegmentor.refine`."""
    if (fractions is None) == (milliseconds is None):
        raise ValueError("give refine either fractions or milliseconds")
    if fractions is not None and (not fractions or list(fractions) != sorted(fractions)):
        raise ValueError(f"fractions must rise, not {list(fractions)}")
    for fraction in fractions or ():
        if not 0 <= fraction <= 1:
            raise ValueError(f"fractions must lie in 0..1, not {fraction}")
    start = now(images.device)
    policy = model.policy
    if not isinstance(policy, ConfidencePolicy):
        policy = ConfidencePolicy(fine_fraction=1.0, block=model.strides[-1])
    run = Refinement(model, images, policy.stored_dtype)
    if milliseconds is not None:
        yield Step(run.logits(), run.levels)
        yield from _within(run, policy, start, milliseconds)
        return
    scores = run.scores(policy)
    for fraction in fractions or ():
        if fraction > 0:
            run.refine(_cut(policy, scores, fraction))
        yield Step(run.logits(), run.levels)


def _cut(policy: ConfidencePolicy, scores: Tensor, fraction: float) -> Tensor:
    """The blocks of the highest scores; with three strides those next in rank get the middle one."""
    scores = blur_scores(scores) if policy.blur else scores
    middle = policy.middle_fraction
    return top_blocks(scores, fraction, None if middle is None else min(middle, 1 - fraction))


def _within(run: Refinement, policy: ConfidencePolicy, start: float, milliseconds: float) -> Iterator[Step]:
    """Steps as large as the time left allows, each at most twice the one before, by measured cost.

    A step costs something by itself (head, upsampling) and something per block. Before the first, a block is
    taken to cost three times its share of the coarse pass, for it has three sites more.
    """
    scores, device = run.scores(policy), run.images.device
    blocks = scores[0].numel()
    per_block, fixed = 3 * (now(device) - start) / blocks, 0.0
    done, largest, last = 0, FIRST_STEP * blocks, (0, 0.0)
    while done < blocks:
        began = now(device)
        left = milliseconds / 1000 - (began - start)
        count = min(int((left - fixed) / per_block), round(largest), blocks - done)
        if left <= fixed or count < min(SMALLEST_STEP * blocks, blocks - done) or count < 1:
            return
        run.refine(_cut(policy, scores, (done + count) / blocks))
        step = Step(run.logits(), run.levels)
        seconds = now(device) - began
        if done and (count - last[0]) * (seconds - last[1]) > 0:  # a line through the last two steps
            per_block = (seconds - last[1]) / (count - last[0])
        fixed = max(0.0, seconds - per_block * count)
        done, largest, last = done + count, 2 * count, (count, seconds)
        yield step
