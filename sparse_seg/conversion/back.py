"""The way back: a converted checkpoint's tensors by the source's names and shapes, bit for bit."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sparse_seg.checkpoint.content import ASIDE, MODULE, Checkpoint
from sparse_seg.checkpoint.file import SUFFIX, load
from sparse_seg.conversion.mapping import COUNTER, Entry
from sparse_seg.errors import CheckpointError
from sparse_seg.files import atomic_write


def to_dense(path: str | Path) -> dict[str, Tensor]:
    """The source's tensors, in its order.

    Raises:
        CheckpointError: missing, damaged or foreign file, or one that no conversion wrote.
    """
    checkpoint = load(path)
    entries, aliases = _read(checkpoint)
    dense = {entry.theirs: to_theirs(checkpoint.weights[entry.ours], entry) for entry in entries}
    return dense | {name: dense[other] for name, other in aliases.items()}


def to_theirs(tensor: Tensor, entry: Entry) -> Tensor:
    """A tensor of ours as the source has it."""
    tensor = tensor[entry.added :] if entry.added else tensor
    tensor = tensor.reshape(entry.shape)
    if entry.roll is not None:
        tensor = torch.roll(tensor, entry.roll[1], entry.roll[0])
    return tensor.contiguous()


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


def _read(checkpoint: Checkpoint) -> tuple[list[Entry], dict[str, str]]:
    """What the file says of the way back, checked against its tensors.

    Raises:
        CheckpointError: it does not name each of them, as the source had it, once.
    """
    path, weights, back = checkpoint.path, checkpoint.weights, checkpoint.origin.back
    if checkpoint.origin.is_trained_here:
        raise CheckpointError(f"{path} was trained by sparse_seg: there is no source to go back to")
    entries, aliases = back.get("entries"), back.get("aliases")
    if isinstance(entries, list) and isinstance(aliases, dict):
        found = [entry for entry in map(_entry, entries) if entry]
        names, stored = {entry.theirs for entry in found}, {entry.ours for entry in found}
        owed = {name for name in weights if name.startswith((MODULE, ASIDE))}
        if (
            len(found) == len(names) == len(stored) == len(entries) > 0
            and stored <= set(weights)
            and all(name in stored or name.endswith(COUNTER) for name in owed)
            and all(_fits(weights[entry.ours], entry) for entry in found)
            and all(isinstance(other, str) and other in names for other in aliases.values())
            and not names & set(aliases)
        ):
            return found, aliases
    raise CheckpointError(f"{path} is damaged: what it says of the way back does not fit its tensors")


def _entry(item: Any) -> Entry | None:
    """An entry as JSON has it; None where it is none."""
    if not isinstance(item, list) or len(item) != 5:
        return None
    ours, theirs, shape, roll, added = item
    whole = (
        isinstance(ours, str)
        and isinstance(theirs, str)
        and _is_counts(shape)
        and (roll is None or (_is_counts(roll) and len(roll) == 2 and roll[0] < len(shape)))
        and _is_counts([added])
    )
    return Entry(ours, theirs, shape, roll and (roll[0], roll[1]), added) if whole else None


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**40 for number in value)


def _fits(tensor: Tensor, entry: Entry) -> bool:
    """Whether a tensor of ours has as many values as the source's."""
    if entry.added and not tensor.ndim:
        return False
    own = (max(tensor.shape[0] - entry.added, 0), *tensor.shape[1:]) if entry.added else tensor.shape
    return math.prod(own) == math.prod(entry.shape)
