"""A source's tensors as ours, and back: names by a `Plan`, shapes by our module.

Every step only moves values or adds rows, so that the way back is exact, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_seg.checkpoint import Checkpoint, load
from sparse_seg.checkpoint.content import ASIDE, MODULE
from sparse_seg.checkpoint.file import SUFFIX, write_safetensors
from sparse_seg.checkpoint.pickled import save_pickled
from sparse_seg.config import ModelConfig
from sparse_seg.conversion.plan import Plan, Tensors
from sparse_seg.errors import CheckpointError, and_more
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


def map_tensors(tensors: Tensors, plan: Plan, config: ModelConfig) -> tuple[dict[str, Tensor], list[Entry]]:
    """Find the source's tensor for each of ours and a reason for each that is left over.

    Returns:
        Tensors by a file's names of ours, of the network and what it does not need; and an entry for each of
        the source's, in its order, but those that are the same as another.

    Raises:
        CheckpointError: a tensor that is missing, of another shape, or without a place; names the first and
            how many there are.
        ConfigError: an impossible config.
    """
    weights, placed, faults = dict(plan.fresh), dict[str, Entry](), list[str]()
    for ours, wanted in meta_module(config).state_dict().items():
        theirs, added = plan.own.source_name(ours), int(ours in plan.added)
        if not plan.has_head and not ours.startswith("backbone."):
            continue
        if ours in plan.own.theirs:
            shapes = _shapes([wanted.shape[0] - added, *wanted.shape[1:]] if added else list(wanted.shape))
            entry = Entry(MODULE + ours, theirs, list(tensors[theirs].shape), plan.rolls.get(ours), added)
            placed[theirs] = entry
            if entry.shape in shapes:
                value = _to_ours(tensors[theirs], entry, plan.added.get(ours, 0.0))
                weights[entry.ours] = value.reshape(wanted.shape).contiguous()
            else:
                faults.append(f"{theirs} is {entry.shape}, a {plan.arch} has {shapes[0]}")
        elif ours.endswith(COUNTER):
            weights[MODULE + ours] = torch.zeros((), dtype=torch.int64)
        else:
            faults.append(f"{theirs} is missing")
    for name in (one for one in tensors if one not in placed and one not in plan.aliases):
        entry = placed[name] = Entry(ASIDE + name, name, list(tensors[name].shape))
        weights[entry.ours] = tensors[name]
        if plan.reason(name) is None:
            faults.append(f"{name} {entry.shape} has no place in it")
    if faults:
        raise CheckpointError(f"it is no {plan.arch}: {and_more(faults, 'more faults')}")
    return weights, [placed[name] for name in tensors if name in placed]


def _shapes(shape: list[int]) -> list[list[int]]:
    """Shapes in which sources have a tensor of ours, the usual one first: convolutions of CAD are 1-D."""
    flat = [*shape[:2], math.prod(shape[2:])]
    return [shape, flat, [*flat, 1]] if len(shape) == 4 else [shape]


def _to_ours(tensor: Tensor, entry: Entry, before: float) -> Tensor:
    """A source's tensor by our order; `before` fills the rows that it lacks."""
    if entry.roll is not None:
        tensor = torch.roll(tensor, -entry.roll[1], entry.roll[0])
    if entry.added:
        tensor = torch.cat([tensor.new_full((entry.added, *tensor.shape[1:]), before), tensor])
    return tensor


def _to_theirs(tensor: Tensor, entry: Entry) -> Tensor:
    tensor = tensor[entry.added :] if entry.added else tensor
    tensor = tensor.reshape(entry.shape)
    if entry.roll is not None:
        tensor = torch.roll(tensor, entry.roll[1], entry.roll[0])
    return tensor.contiguous()


def to_dense(path: str | Path) -> dict[str, Tensor]:
    """The source's tensors of a converted file, by its names and in its order.

    Raises:
        CheckpointError: missing, damaged or foreign file, or one that no conversion wrote.
    """
    return dense_tensors(load(path))


def dense_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """See `to_dense`."""
    path, weights, back = checkpoint.path, checkpoint.weights, checkpoint.origin.back
    if checkpoint.origin.is_trained_here:
        raise CheckpointError(f"{path} was trained by sparse_seg: there is no source to go back to")
    owed = {name for name in weights if name.startswith((MODULE, ASIDE)) and not name.endswith(COUNTER)}
    try:
        entries = [Entry(*item) for item in back["entries"]]
        dense = {entry.theirs: _to_theirs(weights[entry.ours], entry) for entry in entries}
        twins = {name: dense[other] for name, other in back["aliases"].items()}
        used = {entry.ours for entry in entries}
        is_whole = (
            owed <= used
            and len(used) == len(dense) == len(entries) > 0
            and not dense.keys() & twins.keys()
            and all(isinstance(name, str) for name in dense)
            and all(list(dense[entry.theirs].shape) == entry.shape for entry in entries)  # -1 is told by none
            and all(min(*(entry.roll or (0,)), entry.added) >= 0 for entry in entries)
        )
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise CheckpointError(f"{path} is damaged: what it says of the way back does not fit its tensors")
    return dense | twins


def write_dense(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a plain state dict: safetensors by that suffix, else PyTorch's format.

    Raises OSError where it cannot be written, as on a full disk.
    """
    if Path(path).suffix == SUFFIX:
        write_safetensors(path, tensors)
    else:
        save_pickled(path, dict(tensors))
