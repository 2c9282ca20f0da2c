"""Dense checkpoint to selective network and back."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_seg.conversion import cad, mmseg, smp, timm, torchvision, vainf
from sparse_seg.conversion.converted import Description, is_safetensors, read_converted, write_converted
from sparse_seg.conversion.mapping import (
    Entry,
    Expected,
    Mapped,
    expected_tensors,
    map_tensors,
    resolve_config,
    to_ours,
    to_theirs,
)
from sparse_seg.conversion.plan import Options, Plan, Tensors
from sparse_seg.conversion.reading import SourceFile, read_source
from sparse_seg.conversion.safetensors_file import Pending, write_safetensors
from sparse_seg.errors import CheckpointError, ConfigError
from sparse_seg.files import atomic_path

# in the order in which `auto` tries them: a file goes to the first that knows its names
SOURCES: dict[str, ModuleType] = {
    "mmseg": mmseg,
    "smp": smp,
    "cad": cad,
    "vainf": vainf,
    "timm": timm,
    "torchvision": torchvision,
}


@dataclass
class Conversion:
    """A dense network and how it becomes ours; nothing is written yet.

    Args:
        source: name in `SOURCES`.
        file: what was read.
        plan: what the source tells about it.
        description: what the converted file will say.
        mapped, expected: which tensor is which.
    """

    source: str
    file: SourceFile
    plan: Plan
    description: Description
    mapped: Mapped
    expected: dict[str, Expected]

    def network(self) -> dict[str, Tensor]:
        """The network's tensors, by our names and in our layout."""
        converted = {entry.ours: self._tensor(entry) for entry in self.mapped.network}
        return self.mapped.fresh | converted

    def _tensor(self, entry: Entry) -> Tensor:
        tensor, target = self.file.tensors[entry.theirs], self.expected.get(entry.ours)
        return tensor if target is None else to_ours(tensor, target, entry.roll)

    def write(self, path: str | Path) -> None:
        """Write the converted file, with what the network does not need as the source has it.

        Raises OSError where the folder cannot be written.
        """
        pending = {name: Pending.of(tensor) for name, tensor in self.mapped.fresh.items()}
        for entry in self.description.entries:
            shape = self.expected[entry.ours].shape if entry.ours in self.expected else tuple(entry.shape)
            dtype = self.file.tensors[entry.theirs].dtype
            pending[entry.ours] = Pending(shape, dtype, functools.partial(self._tensor, entry))
        write_converted(path, pending, self.description)


def convert(
    path: str | Path,
    source: str = "auto",
    arch: str | None = None,
    num_classes: int | None = None,
    output_stride: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    allow_missing: Sequence[str] = (),
    trust: bool = False,
) -> Conversion:
    """Read a dense checkpoint and find each of its tensors a place.

    Args:
        path: `.pth`, `.pt`, `.ckpt` or `.safetensors`.
        source: name in `SOURCES`, or `auto`: by the names of the tensors.
        arch, num_classes: what the file must hold, as `deeplabv3_resnet50` and 19; None takes what it does.
        output_stride: that the network was trained at, where its tensors cannot tell.
        overrides: model settings in place of those found, for what tensors cannot tell, such as `bn_eps`.
        allow_missing: `("head",)` converts a backbone that has none.
        trust: see `read_source`.

    Raises:
        CheckpointError: the file cannot be read, is of no known source, or a tensor of it has no place, is
            missing, or has another shape. One line that names the file.
        ConfigError: overrides that are impossible.
    """
    file = read_source(path, trust)
    try:
        name = find_source(file.tensors) if source == "auto" else _asked_source(file.tensors, source)
        plan: Plan = SOURCES[name].plan(file.tensors, Options(output_stride))
        _check_expected(plan, arch, num_classes)
        _check_file_name(Path(path).name, plan, output_stride)
        if not plan.has_head and "head" not in allow_missing:
            raise CheckpointError(
                f"it is the classifier {plan.arch} and has no segmentation head; to convert its backbone "
                "alone add --allow-missing head"
            )
        config = resolve_config(plan, overrides or {})
        expected = expected_tensors(config, plan.has_head)
        mapped = map_tensors(file.tensors, plan, expected)
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"{path}: {error}") from None
    entries = [*mapped.network, *(entry for part in mapped.aside.values() for entry in part)]
    order = {theirs: place for place, theirs in enumerate(file.tensors)}
    entries.sort(key=lambda entry: order[entry.theirs])
    description = Description(name, plan.arch, config, entries, mapped.aliases, file.classes, plan.has_head)
    return Conversion(name, file, plan, description, mapped, expected)


def find_source(tensors: Tensors) -> str:
    """The source whose names these are.

    Raises:
        CheckpointError: none that is known.
    """
    for name, module in SOURCES.items():
        if module.detect(tensors):
            return name
    first = ", ".join(list(tensors)[:3])
    raise CheckpointError(
        f"its names ({first}, ...) are of no network that can be converted; known are ResNets of {_listed()}"
    )


def _asked_source(tensors: Tensors, source: str) -> str:
    if source not in SOURCES:
        raise CheckpointError(f"unknown source {source!r}; choose auto or one of {_listed()}")
    # names do not tell CAD's dense networks from VainF's, nor timm's plain ResNets from torchvision's
    twins = {"cad": vainf, "timm": torchvision}
    if SOURCES[source].detect(tensors) or (source in twins and twins[source].detect(tensors)):
        return source
    raise CheckpointError(f"its names are not those of {source}; they are those of {find_source(tensors)}")


def _listed() -> str:
    return ", ".join(sorted(SOURCES))


def _check_expected(plan: Plan, arch: str | None, num_classes: int | None) -> None:
    if arch is not None and arch != plan.arch:
        raise CheckpointError(f"it holds a {plan.arch}, not a {arch}")
    found = plan.config.get("num_classes")
    if num_classes is not None and found != num_classes:
        raise CheckpointError(f"it has {found or 'no'} classes, not {num_classes}")


def _check_file_name(name: str, plan: Plan, output_stride: int | None) -> None:
    """A stride is assumed only where the file's name does not say another, as CAD's `..._os16_...` does."""
    said = re.search(r"(?<![a-z])os(8|16)(?!\d)", name.lower())
    if output_stride is None and plan.assumed and said and int(said[1]) != plan.config["trained_stride"]:
        raise CheckpointError(
            f"its tensors cannot tell the output stride, and its name says {said[1]}: add --output-stride "
            "8 or 16"
        )


def to_dense(path: str | Path) -> dict[str, Tensor]:
    """A converted file's tensors by the source's names and in its layout, bit for bit.

    Raises:
        CheckpointError: missing, truncated or foreign file.
    """
    tensors, description = read_converted(path)
    dense = {entry.theirs: to_theirs(tensors[entry.ours], entry) for entry in description.entries}
    return dense | {name: dense[other] for name, other in description.aliases.items()}


def write_dense(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a plain state dict: safetensors by that suffix, else PyTorch's format."""
    with atomic_path(path) as temporary:
        if is_safetensors(path):
            pending = {name: Pending.of(tensor) for name, tensor in tensors.items()}
            write_safetensors(temporary, pending, {})
        else:
            torch.save(dict(tensors), temporary)
