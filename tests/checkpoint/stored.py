"""What a file of ours stores, and the same file with something else in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from sparse_seg.checkpoint import digest_of


def opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def header_of(path: Path) -> dict[str, Any]:
    """What a file of ours says of itself."""
    return json.loads(opened(path)[1]["sparse_seg"])


def packed(tensors: dict[str, Tensor], header: dict[str, Any]) -> bytes:
    """A file's bytes, with a right digest of what it says."""
    header = {name: value for name, value in header.items() if name != "digest"}
    header["digest"] = digest_of(header)
    text = json.dumps(header).encode("utf-8", "replace").decode()
    return safetensors.torch.save(tensors, {"sparse_seg": text})


def write_changed(source: Path, path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A copy that says something else, with a right digest."""
    header = header_of(source)
    change(header)
    path.write_bytes(packed(opened(source)[0], header))
