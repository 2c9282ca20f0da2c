"""Read a checkpoint of any source: `.safetensors` or PyTorch's own files, in whatever they are wrapped.

Nothing that a file holds is run unless the caller trusts it. PyTorch's files are memory-mapped, so that only
the tensors that are used are read twice (once for their checksums).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sparse_seg.checkpoint import find
from sparse_seg.checkpoint.file import FORMAT, is_ours, is_safetensors, read_safetensors
from sparse_seg.checkpoint.pickled import load_pickled
from sparse_seg.data.class_file import Colour
from sparse_seg.errors import CheckpointError

# keys under which state dicts stand, in the order in which they are taken: averaged weights first, as timm
# and our own checkpoints do. mmengine's `ema_state_dict` is last: it stores the raw weights there.
WRAPPERS = (
    *("model_ema", "state_dict_ema", "ema", "state_dict", "model_state", "model_state_dict"),
    *("model", "net", "network", "ema_state_dict"),
)
MOST_NESTED = 4  # wrappers within wrappers
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class StateDict(NamedTuple):
    """Tensors by the file's own names; way: the keys under which they stand; others: what else stands among
    them, name and type."""

    way: str
    tensors: dict[str, Tensor]
    others: list[str]


class SourceFile(NamedTuple):
    """What a file holds.

    Args:
        candidates: its state dicts, the preferred one first; at least one.
        nameless: wrappers that hold no tensors by name, passed over.
        classes, colours: of the classes, if the file tells.
        arch: the network's name, where the file tells, as timm's training does.
    """

    path: Path
    candidates: list[StateDict]
    nameless: list[str]
    classes: tuple[str, ...] | None
    colours: tuple[Colour, ...] | None
    arch: str


def read_source(path: str | Path, trust: bool = False) -> SourceFile:
    """The state dicts in a file.

    Args:
        trust: load pickles that run code; only for files whose author you trust.

    Raises:
        CheckpointError: missing, damaged or foreign file, one that wants to run code, or one of ours.
    """
    path = find(path)
    if is_safetensors(path):
        content: Any
        content, metadata = read_safetensors(path)
        if is_ours(metadata):
            raise CheckpointError(f"{path} is converted already; --to-dense goes back")
    else:
        content = load_pickled(path, weights_only=not trust)
    content = content.state_dict() if isinstance(content, nn.Module) else content
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    if content.get("format") == FORMAT:
        raise CheckpointError(f"{path} is a checkpoint of sparse_seg's training: it needs no conversion")
    candidates = _with_buffers(list(_candidates(content, ())))
    if not candidates:
        keys = ", ".join(map(str, list(content)[:6])) or "none"
        raise CheckpointError(f"{path} holds no state dict; its keys are: {keys}")
    taken = {candidate.way.partition(" > ")[0] for candidate in candidates}
    nameless = [key for key in WRAPPERS if content.get(key) is not None and key not in taken]
    arch = content.get("arch")
    return SourceFile(path, candidates, nameless, *_classes(content), arch if isinstance(arch, str) else "")


def _candidates(content: Any, way: tuple[str, ...]) -> Iterator[StateDict]:
    """State dicts in a mapping: those in its wrappers first, then its own tensors."""
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping) or len(way) > MOST_NESTED:
        return
    keys = [key for key in WRAPPERS if key in content]
    if way:  # an averaged model of any form
        keys += [key for key, value in content.items() if isinstance(value, (Mapping, nn.Module))]
    for key in dict.fromkeys(keys):
        yield from _candidates(content[key], (*way, str(key)))
    tensors = {str(name): _tensor(value) for name, value in content.items() if _is_tensor(value)}
    if tensors:
        others = [
            f"{name} ({type(value).__name__})"
            for name, value in content.items()
            if not isinstance(value, (Mapping, nn.Module)) and not _is_tensor(value)
        ]
        yield StateDict(" > ".join(way), tensors, others)


def _with_buffers(candidates: Sequence[StateDict]) -> list[StateDict]:
    """Averaged parameters without buffers take those of another state dict in the file."""
    result = []
    for candidate in candidates:
        own = candidate.tensors.keys()
        for donor in candidates:
            missing = donor.tensors.keys() - own
            if own < donor.tensors.keys() and all(name.endswith(BUFFERS) for name in missing):
                way = f"{candidate.way}, with the buffers of {donor.way}"
                candidate = candidate._replace(way=way, tensors=donor.tensors | candidate.tensors)
                break
        result.append(candidate)
    return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _classes(content: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, tuple[Colour, ...] | None]:
    """mmsegmentation's names and colours: `dataset_meta` of version 1, `CLASSES` of version 0."""
    meta = content.get("meta")
    inner = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    found = inner if isinstance(inner, Mapping) and inner else meta
    if not isinstance(found, Mapping):
        return None, None
    names, colours = (found.get(key, found.get(key.upper())) for key in ("classes", "palette"))
    if not isinstance(names, (list, tuple)) or not names:
        return None, None
    try:
        told = tuple((index(red), index(green), index(blue)) for red, green, blue in colours)
    except (TypeError, ValueError):
        told = ()
    whole = len(told) == len(names) and all(0 <= part <= 255 for colour in told for part in colour)
    return tuple(map(str, names)), told if whole else None
