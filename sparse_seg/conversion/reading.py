"""Read a checkpoint of any source: `.safetensors` or PyTorch's own files, in whatever they are wrapped.

Nothing that a file holds is run unless the caller trusts it: plain data and the harmless types below load
with `weights_only=True`, anything else is refused with the name of the flag that would load it. PyTorch's
files are memory-mapped, so that only the tensors that are used are read.
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparse_seg.conversion.safetensors_file import DTYPES
from sparse_seg.errors import CheckpointError

TRUST_FLAG = "--trust"
# keys under which state dicts stand, in the order in which they are taken: averaged weights first, as timm
# and our own checkpoints do. mmengine's `ema_state_dict` is last: it stores the raw weights there.
WRAPPERS = (
    *("model_ema", "state_dict_ema", "ema", "state_dict", "model_state", "model_state_dict"),
    *("model", "net", "network", "ema_state_dict"),
)
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning


@dataclass
class SourceFile:
    """A state dict and what was learnt on the way to it.

    Args:
        tensors: by the source's names, prefixes stripped.
        notes: what was unwrapped, for the report.
        classes: names of the classes, if the file tells.
    """

    path: Path
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    classes: list[str] | None = None


def read_source(path: str | Path, trust: bool = False) -> SourceFile:
    """The state dict in a file.

    Args:
        trust: load pickles that run code; only for files whose author you trust.

    Raises:
        CheckpointError: missing, truncated or foreign file, one that wants to run code, two tensors of one
            name after unwrapping.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; name a checkpoint")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, trust)
    state, notes = _unwrap(content, path)
    file = SourceFile(path, _strip_prefixes(state, path, notes), notes, _class_names(content))
    for name, tensor in file.tensors.items():
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{path}: {name} is {tensor.layout} {tensor.dtype}; it must be a plain tensor"
            )
    return file


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") == "sparse_seg.converted":
                raise CheckpointError(f"{path} is converted already; --to-dense goes back")
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({_line(error)})") from None


def _read_pickle(path: Path, trust: bool) -> Any:
    try:
        with _harmless_types():
            return torch.load(path, "cpu", weights_only=not trust, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None or trust:
            raise CheckpointError(f"{path} is truncated or no PyTorch checkpoint") from None
        raise CheckpointError(
            f"{path} holds a pickled {wanted[1]}, and loading it can run code; if you trust its author "
            f"convert it with {TRUST_FLAG}, else ask for its state dict alone"
        ) from None
    except ImportError as error:
        raise CheckpointError(f"{path} needs {_line(error)}; install it, or save its state dict") from None
    except MemoryError:
        raise
    except Exception as error:  # a broken pickle fails in many ways
        raise CheckpointError(f"{path} is truncated or no PyTorch checkpoint ({_line(error)})") from None


def _harmless_types() -> Any:
    """Lets weights-only loading make what training scripts commonly save beside weights: options and numpy
    numbers (VainF and CAD: the best score). None of them runs code when unpickled."""
    allow: Any = getattr(torch.serialization, "safe_globals", None)
    if allow is None:  # torch 2.4
        return contextlib.nullcontext()
    scalar: Any = np.float64(0).__reduce__()[0]  # numpy's constructor of scalars
    dtypes = [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")]
    # numpy 1 and 2 pickle it by different names
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return allow([argparse.Namespace, np.dtype, *dtypes, *((scalar, name) for name in names)])


def _unwrap(content: Any, path: Path) -> tuple[Mapping[str, Tensor], list[str]]:
    """Down to the dict whose values are all tensors, and the keys on the way to it as notes."""
    way: list[str] = []
    while True:
        if isinstance(content, nn.Module):
            content = content.state_dict()
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
        if content.get("format") == "sparse_seg.checkpoint":
            raise CheckpointError(f"{path} is a checkpoint of sparse_seg's training: it needs no conversion")
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return content, [f"unwrapped from {' > '.join(way)}"] if way else []
        inner = [
            key for key in WRAPPERS if isinstance(content.get(key), (Mapping, nn.Module)) and content[key]
        ]
        if not inner:
            found = ", ".join(map(str, list(content)[:6]))
            raise CheckpointError(f"{path} holds no state dict; its keys are: {found or 'none'}")
        way.append(inner[0])
        content = content[inner[0]]


def _strip_prefixes(state: Mapping[str, Tensor], path: Path, notes: list[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for full, tensor in state.items():
        name = str(full)
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if name == "n_averaged":  # the counter of torch's AveragedModel
            continue
        if name in tensors:
            raise CheckpointError(f"{path} holds {name} twice: as {origin[name]} and as {full}")
        tensors[name], origin[name] = tensor, str(full)
    stripped = sorted({full.removesuffix(name) for name, full in origin.items()} - {""})
    if stripped:
        notes.append(f"prefix {', '.join(stripped)} stripped")
    return tensors


def _class_names(content: Any) -> list[str] | None:
    """mmsegmentation's: `dataset_meta` of version 1, `CLASSES` of version 0."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    if not isinstance(meta, Mapping):
        return None
    dataset = meta.get("dataset_meta")
    names = dataset.get("classes") if isinstance(dataset, Mapping) else meta.get("CLASSES")
    return [str(name) for name in names] if isinstance(names, (list, tuple)) and names else None


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
