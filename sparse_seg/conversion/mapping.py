"""A source's tensors as ours: names by a `Plan`, shapes by our module.

Every step only moves values or adds rows, so `back.py` can undo it bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
    """A whole file: every tensor of the source in one of these.

    Args:
        network: entries of the network; aside: of what it does not need, by reason.
        fresh: our tensors that are none of the source's, with their values: counters that it lacks, and
            those of `Plan.fresh`.
        aliases: the source's name to another of its names with the same values.
    """

    network: list[Entry]
    aside: dict[str, list[Entry]]
    fresh: dict[str, Tensor]
    aliases: dict[str, str]


def expected_shapes(config: ModelConfig, has_head: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of our network's tensors by name.

    Raises:
        ConfigError: an impossible config.
    """
    return {
        name: tuple(tensor.shape)
        for name, tensor in meta_module(config).state_dict().items()
        if has_head or name.startswith("backbone.")
    }


def map_tensors(tensors: Tensors, plan: Plan, expected: Mapping[str, tuple[int, ...]]) -> Mapped:
    """Find the source's tensor for each of ours and a reason for each that is left over.

    Raises:
        CheckpointError: a tensor that is missing, of another shape, or without a place; names the first and
            how many there are.
    """
    network: list[Entry] = []
    fresh = dict(plan.fresh)
    faults: list[str] = []
    for ours, wanted in expected.items():
        theirs = plan.own.source_name(ours)
        if ours in plan.own.theirs:
            shape, added = tensors[theirs].shape, int(ours in plan.added)
            shapes = source_shapes(wanted, added)
            if tuple(shape) not in shapes:
                faults.append(f"{theirs} is {list(shape)}, a {plan.arch} has {list(shapes[0])}")
            network.append(Entry(MODULE + ours, theirs, list(shape), plan.rolls.get(ours), added))
        elif ours.endswith(COUNTER):
            fresh[MODULE + ours] = torch.zeros((), dtype=torch.int64)
        else:
            faults.append(f"{theirs} is missing")
    used = {entry.theirs for entry in network}
    aside: dict[str, list[Entry]] = {}
    for theirs, tensor in tensors.items():
        if theirs in used or theirs in plan.aliases:
            continue
        found = _kept_or_dropped(theirs, plan)
        if found is None:
            faults.append(f"{theirs} {list(tensor.shape)} has no place in it")
            continue
        ours, reason = found
        aside.setdefault(reason, []).append(Entry(ours, theirs, list(tensor.shape)))
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise CheckpointError(f"it is no {plan.arch}: {faults[0]}{more}")
    return Mapped(network, aside, fresh, dict(plan.aliases))


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


def to_ours(tensor: Tensor, shape: tuple[int, ...], entry: Entry, before: float = 0.0) -> Tensor:
    """A source's tensor in our shape; `before` fills the rows that it lacks."""
    if entry.roll is not None:
        tensor = torch.roll(tensor, -entry.roll[1], entry.roll[0])
    if entry.added:
        tensor = torch.cat([tensor.new_full((entry.added, *tensor.shape[1:]), before), tensor])
    return tensor.reshape(shape).contiguous()
