"""A source's tensors as ours: names by a `Plan`, shapes by our module.

Every step only moves values or adds rows, so `back.py` can undo it bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_seg.checkpoint.content import ASIDE, MODULE
from sparse_seg.config import ModelConfig
from sparse_seg.conversion.plan import Plan, Tensors
from sparse_seg.errors import CheckpointError
from sparse_seg.run.weights import meta_module

COUNTER = "num_batches_tracked"  # older files lack it; it counts, and computes nothing


class Entry(NamedTuple):
    """One tensor: a file's name of ours, the source's, its shape there, the roll of `Plan.rolls`, the rows of
    `Plan.added`."""

    ours: str
    theirs: str
    shape: list[int]
    roll: tuple[int, int] | None = None
    added: int = 0


@dataclasses.dataclass
class Mapped:
    """A whole file: every tensor of the source is in an entry, or the same as another.

    Args:
        weights: by a file's names of ours, of the network and what it does not need.
        network: entries of the network; aside: of what it does not need, by reason.
        counters: how many of ours start at 0, for the source has none.
    """

    weights: dict[str, Tensor]
    network: list[Entry]
    aside: dict[str, list[Entry]]
    counters: int = 0


def map_tensors(tensors: Tensors, plan: Plan, config: ModelConfig) -> Mapped:
    """Find the source's tensor for each of ours and a reason for each that is left over.

    Raises:
        CheckpointError: a tensor that is missing, of another shape, or without a place; names the first and
            how many there are.
        ConfigError: an impossible config.
    """
    result, used, faults = Mapped(dict(plan.fresh), [], {}), set(plan.aliases), list[str]()
    for ours, wanted in meta_module(config).state_dict().items():
        if not plan.has_head and not ours.startswith("backbone."):
            continue
        theirs, added = plan.own.source_name(ours), int(ours in plan.added)
        if ours in plan.own.theirs:
            shape, shapes = tensors[theirs].shape, source_shapes(tuple(wanted.shape), added)
            used.add(theirs)
            if tuple(shape) in shapes:
                entry = Entry(MODULE + ours, theirs, list(shape), plan.rolls.get(ours), added)
                value = to_ours(tensors[theirs], wanted.shape, entry, plan.added.get(ours, 0.0))
                result.network.append(entry)
                result.weights[entry.ours] = value
            else:
                faults.append(f"{theirs} is {list(shape)}, a {plan.arch} has {list(shapes[0])}")
        elif ours.endswith(COUNTER):
            result.counters += 1
            result.weights[MODULE + ours] = torch.zeros((), dtype=torch.int64)
        else:
            faults.append(f"{theirs} is missing")
    for theirs, tensor in tensors.items():
        found = _kept_or_dropped(theirs, plan)
        if theirs in used:
            continue
        if found is None:
            faults.append(f"{theirs} {list(tensor.shape)} has no place in it")
        else:
            ours, reason = found
            result.aside.setdefault(reason, []).append(Entry(ours, theirs, list(tensor.shape)))
            result.weights[ours] = tensor
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise CheckpointError(f"it is no {plan.arch}: {faults[0]}{more}")
    return result


def _kept_or_dropped(theirs: str, plan: Plan) -> tuple[str, str] | None:
    """Our name for a tensor that the network does not need, and why it does not."""
    for prefix, reason in plan.dropped.items():
        if theirs.startswith(prefix):
            return ASIDE + theirs, reason
    for prefix, ours in plan.kept.items():
        if theirs.startswith(prefix):
            return ours + theirs.removeprefix(prefix), "mask net, for a learned policy"
    return None


def source_shapes(shape: tuple[int, ...], added: int) -> list[tuple[int, ...]]:
    """Shapes in which sources have a tensor of ours, the usual one first: convolutions of CAD are 1-D."""
    shape = (shape[0] - added, *shape[1:]) if added else shape
    flat: dict[tuple[int, ...], tuple[int, ...]] = {(3, 3): (9, 1), (1, 1): (1,)}
    window = shape[2:]
    return [shape, (*shape[:2], *flat[window])] if window in flat else [shape]


def to_ours(tensor: Tensor, shape: Sequence[int], entry: Entry, before: float = 0.0) -> Tensor:
    """A source's tensor in our shape; `before` fills the rows that it lacks."""
    if entry.roll is not None:
        tensor = torch.roll(tensor, -entry.roll[1], entry.roll[0])
    if entry.added:
        tensor = torch.cat([tensor.new_full((entry.added, *tensor.shape[1:]), before), tensor])
    return tensor.reshape(shape).contiguous()
