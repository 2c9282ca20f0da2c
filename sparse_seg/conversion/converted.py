"""The file that a conversion writes: safetensors with all that is needed to build the network and to go back.

Its metadata (texts, as safetensors has them): `format`, `version` (ours), `source`, `arch`, `holds`
(`network` or `backbone`), `config` (resolved model settings, JSON), `classes` (names or null, JSON),
`tensors` and `aliases` (JSON, see `mapping.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_seg.config import ModelConfig, model_config, to_dict
from sparse_seg.conversion.mapping import Entry
from sparse_seg.conversion.safetensors_file import Pending, write_safetensors
from sparse_seg.errors import CheckpointError
from sparse_seg.files import atomic_path
from sparse_seg.version import __version__

FORMAT = "sparse_seg.converted"
SUFFIX = ".safetensors"


@dataclass
class Description:
    """What the metadata say.

    Args:
        source, arch: where the weights come from, as `torchvision` and `deeplabv3_resnet50`.
        config: model settings with all values.
        entries: every tensor of the source that the file holds, see `mapping.py`.
        aliases: the source's name to another of its names with the same values.
        classes: names of the classes, if the source told.
        has_head: False for a backbone alone.
    """

    source: str
    arch: str
    config: ModelConfig
    entries: list[Entry]
    aliases: dict[str, str] = field(default_factory=dict)
    classes: list[str] | None = None
    has_head: bool = True
    version: str = __version__


def is_safetensors(path: str | Path) -> bool:
    """Whether a file is safetensors by its name."""
    return Path(path).suffix == SUFFIX


def is_converted(path: str | Path) -> bool:
    """Whether a file is one that a conversion wrote, by its content."""
    if not is_safetensors(path) or not Path(path).is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError, ValueError):
        return False


def write_converted(path: str | Path, tensors: Mapping[str, Pending], description: Description) -> None:
    """Write a converted network. Raises OSError where the folder cannot be written."""
    metadata = {
        "format": FORMAT,
        "version": description.version,
        "source": description.source,
        "arch": description.arch,
        "holds": "network" if description.has_head else "backbone",
        "config": json.dumps(to_dict(description.config)),
        "classes": json.dumps(description.classes),
        "tensors": json.dumps(description.entries),
        "aliases": json.dumps(description.aliases),
    }
    with atomic_path(path) as temporary:
        write_safetensors(temporary, tensors, metadata)


def read_converted(path: str | Path) -> tuple[dict[str, Tensor], Description]:
    """A converted file's tensors and what its metadata say.

    Raises:
        CheckpointError: missing, truncated or foreign file.
    """
    with _opened(path) as file:
        description = _description(path, file.metadata() or {})
        return {name: file.get_tensor(name) for name in file.keys()}, description  # noqa: SIM118


def read_description(path: str | Path) -> Description:
    """As `read_converted`, without reading the tensors."""
    with _opened(path) as file:
        return _description(path, file.metadata() or {})


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    if not Path(path).is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError):
        raise CheckpointError(f"{path} is truncated or no safetensors file; convert it again") from None


def _description(path: str | Path, metadata: Mapping[str, str]) -> Description:
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by a conversion; run: sparse-seg convert {path} DST")
    entries = [
        Entry(ours, theirs, shape, krsc, roll and (roll[0], roll[1]))
        for ours, theirs, shape, krsc, roll in json.loads(metadata["tensors"])
    ]
    return Description(
        source=metadata["source"],
        arch=metadata["arch"],
        config=model_config(json.loads(metadata["config"])),
        entries=entries,
        aliases=json.loads(metadata["aliases"]),
        classes=json.loads(metadata["classes"]),
        has_head=metadata["holds"] == "network",
        version=metadata["version"],
    )


def network_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the network, without what is only kept for the way back or for policy `learned`."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(("backbone.", "head."))}
