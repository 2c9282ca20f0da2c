"""A source's tensors as ours, and back: names by a `Plan`, shapes by our module.

Every step only moves values or adds rows, so that the way back is exact, bit for bit.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from sparse_seg.checkpoint import Checkpoint, load
from sparse_seg.checkpoint.content import ASIDE, MODULE
from sparse_seg.checkpoint.file import SUFFIX
from sparse_seg.config import ModelConfig
from sparse_seg.conversion.plan import Plan, Tensors
from sparse_seg.errors import CheckpointError
from sparse_seg.files import atomic_write
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


class Mapped(NamedTuple):
    """A whole file: every tensor of the source is in an entry, or the same as another.

    Args:
        weights: by a file's names of ours, of the network and what it does not need.
        entries: in the source's order.
        aside: the source's names of what the network does not need, by reason.
        counters: how many of ours start at 0, for the source has none.
    """

    weights: dict[str, Tensor]
    entries: list[Entry]
    aside: dict[str, list[str]]
    counters: int


def map_tensors(tensors: Tensors, plan: Plan, config: ModelConfig) -> Mapped:
    """Find the source's tensor for each of ours and a reason for each that is left over.

    Raises:
        CheckpointError: a tensor that is missing, of another shape, or without a place; names the first and
            how many there are.
        ConfigError: an impossible config.
    """
    result, faults = Mapped(dict(plan.fresh), [], {}, 0), list[str]()
    placed, counters = dict[str, Entry](), 0
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
                result.weights[entry.ours] = value.reshape(wanted.shape).contiguous()
            else:
                faults.append(f"{theirs} is {entry.shape}, a {plan.arch} has {shapes[0]}")
        elif ours.endswith(COUNTER):
            counters += 1
            result.weights[MODULE + ours] = torch.zeros((), dtype=torch.int64)
        else:
            faults.append(f"{theirs} is missing")
    for theirs, tensor in tensors.items():
        reason = next((why for prefix, why in plan.dropped.items() if theirs.startswith(prefix)), None)
        if theirs in plan.aliases:
            continue
        if theirs not in placed and reason is not None:
            placed[theirs] = Entry(ASIDE + theirs, theirs, list(tensor.shape))
            result.weights[ASIDE + theirs] = tensor
            result.aside.setdefault(reason, []).append(theirs)
        if theirs in placed:
            result.entries.append(placed[theirs])
        else:
            faults.append(f"{theirs} {list(tensor.shape)} has no place in it")
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise CheckpointError(f"it is no {plan.arch}: {faults[0]}{more}")
    return result._replace(counters=counters)


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
        atomic_write(path, safetensors.torch.save({name: tensor.clone() for name, tensor in tensors.items()}))
    else:
        buffer = io.BytesIO()  # on a full disk torch.save raises RuntimeError, which tells nothing
        torch.save(dict(tensors), buffer)
        atomic_write(path, buffer.getvalue())
