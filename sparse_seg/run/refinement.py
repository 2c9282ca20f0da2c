"""Anytime prediction: a coarse pass, then only the sites that a finer mask adds (P4 of docs/method.md).

The first result is the dense network at the coarsest stride. Blocks are ranked once, by that pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from numbers import Real
from typing import Any, NamedTuple

from torch import Tensor

from sparse_seg.errors import shown
from sparse_seg.masks import ConfidencePolicy, MaskPolicy, blur_scores, top_blocks
from sparse_seg.timing import now

FIRST_STEP, SMALLEST_STEP = 0.05, 0.01  # of all blocks, when steps are sized by time


class Refined(NamedTuple):
    """A result: logits `[B, K, H, W]` and the blocks' levels int64 `[B, Hc, Wc]`."""

    logits: Tensor
    levels: Tensor


def refine(
    model: Any,
    images: Tensor,
    fractions: Iterable[float] | None = None,
    milliseconds: float | None = None,
) -> Iterator[Refined]:
    """See `SelectiveNetwork.refine`.

    Args:
        model: whose passes can be refined.

    Raises:
        ValueError: as there.
    """
    if (fractions is None) == (milliseconds is None):
        raise ValueError("give refine either fractions or milliseconds")
    try:
        shares = None if fractions is None else [float(one) for one in fractions]
    except (TypeError, ValueError, RuntimeError):  # of a tensor with several axes
        raise ValueError(f"fractions must be a list of numbers in 0..1, not {shown(fractions)}") from None
    if milliseconds is not None and not (isinstance(milliseconds, Real) and math.isfinite(milliseconds)):
        raise ValueError(f"milliseconds must be a finite number, not {shown(milliseconds)}")
    if shares is not None and (not shares or shares != sorted(shares)):
        raise ValueError(f"fractions must rise, and be one or more, not {shares}")
    for share in shares or ():
        if not 0 <= share <= 1:
            raise ValueError(f"fractions must lie in 0..1, not {share}")
    start, policy = now(images.device), model.policy
    if not policy.ranks_refinement:
        policy = ConfidencePolicy(fine_fraction=1.0, block=model.strides[-1])
    run = model.start(images).start_coarse(getattr(policy, "stored_dtype", None))
    if milliseconds is not None:
        yield Refined(run.logits(), run.levels)
        yield from _within(run, policy, start, milliseconds)
        return
    scores = policy.scores(run)
    for share in shares or ():
        if share > 0:
            run.take(_cut(policy, scores, share))
        yield Refined(run.logits(), run.levels)


def _cut(policy: MaskPolicy, scores: Tensor, fraction: float) -> Tensor:
    """The blocks of the highest scores; with three strides those next in rank get the middle one."""
    scores = blur_scores(scores) if policy.blur else scores
    middle = policy.middle_fraction
    return top_blocks(scores, fraction, None if middle is None else min(middle, 1 - fraction))


def _within(run: Any, policy: MaskPolicy, start: float, milliseconds: float) -> Iterator[Refined]:
    """Steps as large as the time left allows, each at most twice the one before, by measured cost.

    A step costs something by itself (head, upsampling) and something per block. Before the first, a block is
    taken to cost three times its share of the coarse pass, for it has three sites more.
    """
    scores, device = policy.scores(run), run.images.device
    blocks = scores[0].numel()
    per_block, fixed = 3 * (now(device) - start) / blocks, 0.0
    done, largest, last = 0, FIRST_STEP * blocks, (0, 0.0)
    while done < blocks:
        began = now(device)
        left = milliseconds / 1000 - (began - start)
        count = min(int((left - fixed) / per_block), round(largest), blocks - done)
        if left <= fixed or count < min(SMALLEST_STEP * blocks, blocks - done) or count < 1:
            return
        result = Refined(run.take(_cut(policy, scores, (done + count) / blocks)).logits(), run.levels)
        seconds = now(device) - began
        if done and (count - last[0]) * (seconds - last[1]) > 0:  # a line through the last two steps
            per_block = (seconds - last[1]) / (count - last[0])
        fixed = max(0.0, seconds - per_block * count)
        done, largest, last = done + count, 2 * count, (count, seconds)
        yield result
