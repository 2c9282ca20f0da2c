"""The way back: a converted checkpoint's tensors by the source's names and shapes, bit for bit."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from sparse_seg.checkpoint.content import ASIDE, MODULE
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
    if checkpoint.origin.is_trained_here:
        raise CheckpointError(f"{path} was trained by sparse_seg: there is no source to go back to")
    weights, back = checkpoint.weights, checkpoint.origin.back
    owed = {name for name in weights if name.startswith((MODULE, ASIDE)) and not name.endswith(COUNTER)}
    try:
        entries = [Entry(*item) for item in back["entries"]]
        dense = {entry.theirs: to_theirs(weights[entry.ours], entry) for entry in entries}
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
