"""Any module and its weights to a checkpoint: the module is made by the code that defines it, and captured.

Strict as every conversion: each tensor of the file finds its place in the module, and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.checkpoint.captured import write_network
from sparse_seg.checkpoint.content import IMAGENET_MEAN, IMAGENET_STD
from sparse_seg.config import model_config
from sparse_seg.conversion.mapping import COUNTER
from sparse_seg.conversion.reading import read_source
from sparse_seg.data.class_file import ClassFile
from sparse_seg.errors import CheckpointError
from sparse_seg.run.weights import load_weights, shape_faults
from sparse_seg.run.build import build_module, capture_module
from sparse_seg.run.network import SelectiveNetwork

WRAPPED = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before names


@dataclass(frozen=True)
class ModuleConversion:
    """A captured network with its weights, and what a file says beside them.

    Args:
        told: what the classes are, where the caller says it.
        normalisation: how mean and std are known; empty where they are ImageNet's for want of others.
    """

    network: SelectiveNetwork
    told: ClassFile | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalisation: str

    def write(self, path: str | Path) -> None:
        """Raises OSError where the folder cannot be written."""
        names = colours = ids = None
        if self.told is not None:
            names, colours = self.told.classes.names, self.told.classes.palette
            ids = self.told.ids
        write_network(self.network, path, names, colours, ids, self.mean, self.std, self.normalisation)

    def report(self) -> str:
        """Lines for the terminal."""
        network, report = self.network, self.network.report()
        dense, selective = report.total("dense"), report.total("selective")
        parts = [row.part for row in report.rows]
        counts = ", ".join(f"{parts.count(part)} {part}" for part in ("early", "rows", "late"))
        tensors = network.module.state_dict()
        values = sum(tensor.numel() for tensor in tensors.values())
        mean, std = ([round(value, 6) for value in one] for one in (self.mean, self.std))
        lines = [
            ("module", f"{network.name}, {len(tensors)} tensors, {values / 1e6:.2f} M values"),
            (
                "network",
                f"{network.num_classes} classes, trained at output stride {network.geometry.own}, strides "
                f"{list(network.strides)}, convolutions: {counts}",
            ),
            (
                "cost",
                f"{selective / 1e9:.2f} GMACs, {selective / dense:.2f} of dense OS{network.strides[0]}'s, at "
                f"{report.size[0]}x{report.size[1]} and a share of {report.fraction:g} fine",
            ),
            ("", report.limit),
            ("input", f"RGB in 0..1, mean {mean}, std {std} ({self.normalisation or 'ImageNet, assumed'})"),
        ]
        lines += [] if self.told is None else [("classes", ", ".join(self.told.classes.names))]
        return "\n".join(f"{title:<10}{text}" for title, text in lines)


def convert_module(
    path: str | Path,
    name: str,
    arguments: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    trust: bool = False,
    prefix: str | None = None,
    drop: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: ClassFile | None = None,
) -> ModuleConversion:
    """Make a module, load its weights, and capture it.

    Args:
        path: `.pth`, `.pt`, `.ckpt` or `.safetensors` with the module's state dict.
        name, arguments: `PACKAGE:CALLABLE` that makes the module, and what it takes.
        overrides: model settings, as `strides` and `mask`; by default the policy is `confidence`.
        trust: see `read_source`.
        prefix: under which the module's tensors stand in the file; None looks for it. All else is left out.
        drop: prefixes of names to leave out.
        mean, std: of the network's input, RGB in units of 0..1; None takes ImageNet's.
        classes: what the classes are.

    Raises:
        CheckpointError: the file cannot be read, or does not fit; names the first tensor.
        ConfigError: the module cannot be made, or impossible settings.
        NotSelective, UnknownOperator, CaptureFailed, GraphDiffers: see `selective`.
    """
    given = dict(overrides or {})
    nested = given.pop("model", {})
    mask = {"policy": "confidence"} | given.pop("mask", {}) | nested.pop("mask", {})
    settings = model_config({**given, **nested, "module": name, "module_args": dict(arguments), "mask": mask})
    module = build_module(name, arguments).eval()
    weights = module_weights(path, module, trust, prefix, drop)
    load_weights(module, weights, path)
    network = capture_module(module, settings)
    if classes is not None and len(classes.classes) != network.num_classes:
        raise CheckpointError(
            f"{name} has {network.num_classes} classes, but {len(classes.classes)} are given; name its own"
        )
    scaling = mean is not None and std is not None
    return ModuleConversion(
        network,
        classes,
        tuple(mean) if scaling and mean else IMAGENET_MEAN,
        tuple(std) if scaling and std else IMAGENET_STD,
        "as told" if scaling else "",
    )


def module_weights(
    path: str | Path,
    module: nn.Module,
    trust: bool = False,
    prefix: str | None = None,
    drop: Sequence[str] = (),
) -> dict[str, Tensor]:
    """A file's tensors by a module's names: of the first of its state dicts that fits.

    Raises:
        CheckpointError: none fits; names the first tensor that is missing, left over or of another shape.
    """
    own, failed = module.state_dict(), list[tuple[int, str]]()
    for candidate in read_source(path, trust).candidates:
        tensors = renamed(candidate.tensors, own, prefix)
        tensors = {name: one for name, one in tensors.items() if not name.startswith(tuple(drop))}
        counters = [name for name in own if name.endswith(COUNTER) and name not in tensors]
        tensors |= {name: torch.zeros_like(own[name]) for name in counters}  # older files lack them
        faults = shape_faults(own, tensors)
        if not faults:
            return tensors
        failed.append((len(tensors), f"{faults[0]}{f' (and {len(faults) - 1} more)' if faults[1:] else ''}"))
    raise CheckpointError(
        f"{path} does not fit the module: {max(failed)[1]}; check --args, --prefix and --drop"
    )


def renamed(
    tensors: Mapping[str, Tensor], own: Mapping[str, Any], prefix: str | None = None
) -> dict[str, Tensor]:
    """Without what wrappers put before all names; below `prefix` alone."""
    found = dict(tensors)
    for before in WRAPPED * 2:
        if all(name.startswith(before) for name in found) and not any(
            name.startswith(before) for name in own
        ):
            found = {name.removeprefix(before): tensor for name, tensor in found.items()}
    if prefix is None:
        last = next(iter(own), "")
        places = [name.removesuffix(last) for name in found if name.endswith(last)]
        whole = [one for one in places if all(one + name in found or name.endswith(COUNTER) for name in own)]
        prefix = min(whole, key=len, default="")
        if not all(name.startswith(prefix) for name in found):  # the rest would be left out in silence
            prefix = ""
    elif prefix and not prefix.endswith("."):
        prefix += "."
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
