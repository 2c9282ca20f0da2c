"""Between a source's tensors and ours: names by a `Plan`, shapes by what kind of module ours is.

Every step only moves values, so it can be undone bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_seg.config import ModelConfig, model_config
from sparse_seg.conversion.plan import Plan, Tensors
from sparse_seg.errors import CheckpointError
from sparse_seg.models.build import build_model
from sparse_seg.sparse import SelectiveConv2d, SelectiveDepthwiseConv2d

ASIDE = "source."  # our prefix of tensors that the network does not need, kept for the way back
COUNTER = "num_batches_tracked"  # older files lack it; it counts, and computes nothing


class Entry(NamedTuple):
    """One tensor: our name, the source's, its shape there, whether ours is KRSC, the roll of `Plan.rolls`."""

    ours: str
    theirs: str
    shape: list[int]
    krsc: bool = False
    roll: tuple[int, int] | None = None


@dataclasses.dataclass
class Mapped:
    """A whole file: every tensor of the source in one of these.

    Args:
        network: entries of the network; aside: of what it does not need, by reason.
        fresh: our tensors that the source lacks and that compute nothing, with their values.
        aliases: the source's name to another of its names with the same values.
    """

    network: list[Entry]
    aside: dict[str, list[Entry]]
    fresh: dict[str, Tensor]
    aliases: dict[str, str]


class Expected(NamedTuple):
    """Our tensor's shape, and whether it is stored KRSC."""

    shape: tuple[int, ...]
    krsc: bool


def expected_tensors(config: ModelConfig, has_head: bool) -> dict[str, Expected]:
    """Our network's tensors, without memory for them.

    Raises:
        ConfigError: an impossible config.
    """
    with torch.device("meta"):
        model: nn.Module = build_model(config)
    krsc = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (SelectiveConv2d, SelectiveDepthwiseConv2d))
    }
    return {
        name: Expected(tuple(tensor.shape), name in krsc)
        for name, tensor in model.state_dict().items()
        if has_head or name.startswith("backbone.")
    }


def resolve_config(plan: Plan, overrides: Mapping[str, object]) -> ModelConfig:
    """The plan's config with the user's changes.

    Raises:
        ConfigError: unknown key or impossible value.
    """
    return model_config({**plan.config, **overrides})


def map_tensors(tensors: Tensors, plan: Plan, expected: Mapping[str, Expected]) -> Mapped:
    """Find the source's tensor for each of ours and a reason for each that is left over.

    Raises:
        CheckpointError: a tensor that is missing, of another shape, or without a place; names the first and
            how many there are.
    """
    network: list[Entry] = []
    fresh: dict[str, Tensor] = {}
    faults: list[str] = []
    for ours, target in expected.items():
        module, _, leaf = ours.rpartition(".")
        if module not in plan.modules:
            faults.append(f"{ours}, which the changed settings ask for, is missing")
            continue
        theirs = f"{plan.modules[module]}.{leaf}"
        if theirs in tensors:
            shape = tensors[theirs].shape
            if tuple(shape) not in source_shapes(target):
                wanted = list(source_shapes(target)[0])
                faults.append(f"{theirs} is {list(shape)}, a {plan.arch} has {wanted}")
            network.append(Entry(ours, theirs, list(shape), target.krsc, plan.rolls.get(ours)))
        elif leaf == COUNTER:
            fresh[ours] = torch.zeros((), dtype=torch.int64)
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
    for prefix, ours in plan.kept.items():
        if theirs.startswith(prefix):
            return ours + theirs.removeprefix(prefix), "mask net, for a learned policy"
    for prefix, reason in plan.dropped.items():
        if theirs.startswith(prefix):
            return ASIDE + theirs, reason
    return None


def source_shapes(target: Expected) -> list[tuple[int, ...]]:
    """Shapes in which sources have a tensor of ours, the usual one first."""
    shape = target.shape
    if target.krsc:
        outside, _, _, inside = shape
        return [(outside, inside, 3, 3), (outside, inside, 9, 1)]
    if len(shape) == 2:  # a linear layer on rows
        return [(*shape, 1, 1), (*shape, 1)]
    return [shape]


def to_ours(tensor: Tensor, target: Expected, roll: tuple[int, int] | None) -> Tensor:
    """A source's tensor in our layout."""
    if roll is not None:
        tensor = torch.roll(tensor, -roll[1], roll[0])
    if target.krsc:
        outside, _, _, inside = target.shape
        tensor = tensor.reshape(outside, inside, 3, 3).permute(0, 2, 3, 1)
    return tensor.reshape(target.shape).contiguous()


def to_theirs(tensor: Tensor, entry: Entry) -> Tensor:
    """The way back: a tensor of ours in the source's layout."""
    if entry.krsc:
        tensor = tensor.permute(0, 3, 1, 2)
    tensor = tensor.reshape(entry.shape)
    if entry.roll is not None:
        tensor = torch.roll(tensor, entry.roll[1], entry.roll[0])
    return tensor.contiguous()
