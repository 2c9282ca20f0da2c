"""Read a checkpoint of any source: `.safetensors` or PyTorch's own files, in whatever they are wrapped.

Nothing that a file holds is run unless the caller trusts it: plain data and the harmless types below load
with `weights_only=True`, anything else is refused with the name of the flag that would load it. PyTorch's
files are memory-mapped, so that only the tensors that are used are read twice (once for their checksums).
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_seg.checkpoint import find
from sparse_seg.checkpoint.file import is_ours, is_safetensors, read_safetensors
from sparse_seg.checkpoint.pickled import load_pickled
from sparse_seg.errors import CheckpointError

# keys under which state dicts stand, in the order in which they are taken: averaged weights first, as timm
# and our own checkpoints do. mmengine's `ema_state_dict` is last: it stores the raw weights there.
WRAPPERS = (
    *("model_ema", "state_dict_ema", "ema", "state_dict", "model_state", "model_state_dict"),
    *("model", "net", "network", "ema_state_dict"),
)
MOST_NESTED = 4  # wrappers within wrappers


@dataclass
class StateDict:
    """Tensors by name, as they stand in a file.

    Args:
        way: the keys under which they stand.
        tensors: by the file's own names.
        others: what else stands among them: name and type.
    """

    way: str
    tensors: dict[str, Tensor]
    others: list[str] = field(default_factory=list)


@dataclass
class SourceFile:
    """What a file holds.

    Args:
        candidates: its state dicts, the preferred one first; at least one.
        nameless: wrappers that hold no tensors by name, passed over.
        classes, colours: of the classes, if the file tells.
        arch: the network's name, where the file tells, as timm's training does.
    """

    path: Path
    candidates: list[StateDict]
    nameless: list[str] = field(default_factory=list)
    classes: list[str] | None = None
    colours: list[list[int]] | None = None
    arch: str = ""


def read_source(path: str | Path, trust: bool = False) -> SourceFile:
    """The state dicts in a file.

    Args:
        trust: load pickles that run code; only for files whose author you trust.

    Raises:
        CheckpointError: missing, damaged or foreign file, one that wants to run code, or one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; name a checkpoint")
    path = find(path)
    if is_safetensors(path):
        content: Any = read_safetensors(path)[0]
    else:
        with _harmless_types():
            content = load_pickled(path, weights_only=not trust)
    _refuse_own(path, content)
    if not isinstance(content, (Mapping, nn.Module)):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    candidates = list(_candidates(content, ()))
    if not candidates:
        keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, Mapping) else ""
        raise CheckpointError(f"{path} holds no state dict; its keys are: {keys or 'none'}")
    taken = {candidate.way.partition(" > ")[0] for candidate in candidates}
    wrappers = [key for key in WRAPPERS if isinstance(content, Mapping) and content.get(key) is not None]
    nameless = [key for key in wrappers if key not in taken]
    arch = content.get("arch") if isinstance(content, Mapping) else None
    told = arch if isinstance(arch, str) else ""
    return SourceFile(path, candidates, nameless, *_class_names(content), told)


def _refuse_own(path: Path, content: Any) -> None:
    if isinstance(content, Mapping) and content.get("format") == "sparse_seg.checkpoint":
        raise CheckpointError(f"{path} is a checkpoint of sparse_seg's training: it needs no conversion")
    if is_safetensors(path) and is_ours(path):
        raise CheckpointError(f"{path} is converted already; --to-dense goes back")


class _Inert:
    """Stands for a class that is not needed, such as mmengine's history of losses: takes any state, does
    nothing."""

    def __setstate__(self, state: Any) -> None:
        pass


def _harmless_types() -> Any:
    """Lets weights-only loading make what training scripts commonly save beside weights: options, paths,
    numpy arrays and numbers, mmengine's history of losses. None of them runs code when unpickled."""
    allow: Any = getattr(torch.serialization, "safe_globals", None)
    if allow is None:  # torch 2.4
        return contextlib.nullcontext()
    scalar: Any = np.float64(0).__reduce__()[0]  # numpy's constructors of scalars and of arrays
    array: Any = np.zeros(0).__reduce__()[0]
    kinds = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool", "str")
    dtypes = [type(np.dtype(name)) for name in kinds]
    # numpy 1 and 2 pickle them by different names
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    numpy = [(scalar, f"{module}.scalar") for module in modules]
    numpy += [(array, f"{module}._reconstruct") for module in modules]
    pure = {"Posix": pathlib.PurePosixPath, "Windows": pathlib.PureWindowsPath}
    paths = [
        (kind, f"{module}.{prefix}{name}Path")
        for name, kind in pure.items()
        for prefix in ("", "Pure")
        for module in ("pathlib", "pathlib._local")
    ]
    inert = [(_Inert, "mmengine.logging.history_buffer.HistoryBuffer")]
    return allow([argparse.Namespace, np.dtype, np.ndarray, *dtypes, scalar, array, *numpy, *paths, *inert])


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


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")


def _tensor(value: Tensor | np.ndarray) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _class_names(content: Any) -> tuple[list[str] | None, list[list[int]] | None]:
    """mmsegmentation's names and colours: `dataset_meta` of version 1, `CLASSES` of version 0."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    if not isinstance(meta, Mapping):
        return None, None
    found = meta.get("dataset_meta")
    if not isinstance(found, Mapping):
        found = {"classes": meta.get("CLASSES"), "palette": meta.get("PALETTE")}
    names, colours = found.get("classes"), found.get("palette")
    if not isinstance(names, (list, tuple)) or not names:
        return None, None
    if not isinstance(colours, (list, tuple)) or not all(map(_is_colour, colours)):
        colours = []
    told = [list(map(int, colour)) for colour in colours] if len(colours) == len(names) else None
    return [str(name) for name in names], told


def _is_colour(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(isinstance(part, (int, np.integer)) and 0 <= part <= 255 for part in value)
    )
