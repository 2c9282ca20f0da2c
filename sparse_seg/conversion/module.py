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
from sparse_seg.config import model_config
from sparse_seg.conversion.mapping import COUNTER
from sparse_seg.conversion.naming import dotted
from sparse_seg.conversion.reading import read_source
from sparse_seg.conversion.told import Scaling, check_classes, scaling_of
from sparse_seg.data.class_file import ClassFile
from sparse_seg.errors import CheckpointError
from sparse_seg.run.build import capture_module, import_module
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.weights import load_weights, part_of, shape_faults

WRAPPED = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before names


@dataclass(frozen=True)
class ModuleConversion:
    """A captured network with its weights, and what a file says beside them.

    Args:
        told: what the classes are, where the caller says it.
        scaling: of the input.
    """

    network: SelectiveNetwork
    told: ClassFile | None
    scaling: Scaling

    def write(self, path: str | Path) -> None:
        """Raises OSError where the folder cannot be written."""
        names = colours = ids = None
        if self.told is not None:
            names, colours = self.told.classes.names, self.told.classes.palette
            ids = self.told.ids
        write_network(self.network, path, names, colours, ids, *self.scaling)


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
    module = import_module(name, arguments).eval()
    weights = module_weights(path, module, trust, prefix, drop)
    load_weights(module, weights, path)
    network = capture_module(module, settings)
    check_classes(classes, network.num_classes, name)
    return ModuleConversion(network, classes, scaling_of(mean, std, Scaling()))


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
    return part_of(found, dotted(prefix))
