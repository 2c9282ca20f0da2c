"""Files of version 0.1, and weights of formats up to 2, in today's terms.

A `.pt` file of training is still how its resumable state is kept (see `training/checkpoint.py`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_seg.checkpoint.content import (
    ASIDE,
    EARLIER_PARTS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MODULE,
    PARTS,
    Checkpoint,
    Origin,
    is_state_dict,
    parse,
)
from sparse_seg.checkpoint.digest import digest_of
from sparse_seg.config import ModelConfig
from sparse_seg.data import DATASETS
from sparse_seg.errors import CheckpointError

CONVERTED = "sparse_seg.converted"
_CAD_NET, _CAD_LOGITS = "mask_net.", "mask_net.7."  # of conversions, with CAD's own two logits
_ROWS = re.compile(r"backbone\.layer\d\.\d+\.conv\d\.weight|head\.aspp\.atrous\.\d+\.(depthwise\.)?weight")


def from_training(content: Mapping[str, Any], path: Path) -> Checkpoint:
    """A checkpoint from the content of a `.pt` file: averaged weights where training kept them.

    Raises:
        CheckpointError: an entry that is missing or impossible.
    """
    weights = content.get("ema") or content.get("model")
    if not is_state_dict(weights):
        raise CheckpointError(f"{path} is damaged: its weights are no tensors by name")
    config = content.get("config")
    model, data = (_mapping(config, part) for part in ("model", "data"))
    classifier = weights.get("module.head.classifier.weight", weights.get("head.classifier.weight"))
    if model.get("module") is not None:
        raise CheckpointError(f"{path} is to resume from; its network is in best.safetensors beside it")
    if not model or classifier is None or not classifier.ndim:
        raise CheckpointError(f"{path} is damaged: it holds no whole network with its config")
    count, dataset = classifier.shape[0], data.get("dataset")
    known = DATASETS.get(dataset) if isinstance(dataset, str) else None
    classes = known.classes if known is not None and len(known.classes) == count else None
    return _parsed(
        dict(weights),
        path,
        {"source": "sparse_seg", "normalisation": "as trained"},
        version=content.get("version"),
        model=dict(model) | {"num_classes": count},
        classes=classes and list(classes.names),
        colours=classes and [list(colour) for colour in classes.palette],
        mean=data.get("mean"),
        std=data.get("std"),
        training={"config": config},
    )


def from_conversion(metadata: Mapping[str, str], tensors: dict[str, Tensor], path: Path) -> Checkpoint:
    """A checkpoint from a converted file. It says nothing about mean and std.

    Raises:
        CheckpointError: an entry that is missing or impossible.
    """
    try:
        model, classes, entries, aliases = (
            json.loads(metadata[key]) for key in ("config", "classes", "tensors", "aliases")
        )
        aside = {ours: ASIDE + theirs for ours, theirs, *_ in entries if ours.startswith(_CAD_NET)}
        back = {"entries": [[aside.get(ours, ours), *rest, 0] for ours, *rest in entries], "aliases": aliases}
        weights = {aside.get(name, name): tensor for name, tensor in tensors.items()}
        for name in aside:
            tensor = tensors[name]
            tensor = tensor[:1] - tensor[1:] if name.startswith(_CAD_LOGITS) else tensor
            weights[name.replace(_CAD_NET, "policy.net.")] = tensor
        origin = {
            "source": metadata["source"],
            "arch": metadata["arch"],
            "has_head": metadata["holds"] == "network",
            "learned_net": "cad_mask_net",
            "back": back,
        }
        version = metadata["version"]
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError, RuntimeError):
        raise CheckpointError(f"{path} is damaged: what it says of itself cannot be read") from None
    mean, std = list(IMAGENET_MEAN), list(IMAGENET_STD)
    return _parsed(weights, path, origin, version=version, model=model, classes=classes, mean=mean, std=std)


def _parsed(weights: dict[str, Tensor], path: Path, origin: dict[str, Any], **said: Any) -> Checkpoint:
    """What a file says, with what these versions did not say."""
    whole = dataclasses.asdict(Origin(normalisation="")) | origin
    description = {"colours": None, "training": {}, "origin": whole, **said}
    return parse(description, weights, path, digest_of(weights))


def _mapping(tree: Any, key: str) -> Mapping[str, Any]:
    value = tree.get(key) if isinstance(tree, Mapping) else None
    return value if isinstance(value, Mapping) else {}


# -- weights of formats up to 2, whose networks kept layouts of their own ------------------------------------


def as_today(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of any format, as this version writes it."""
    config, origin, entries = checkpoint.config, checkpoint.origin, checkpoint.origin.back.get("entries")
    if isinstance(entries, list):
        back = {"entries": [_entry(entry, config) for entry in entries]}
        origin = dataclasses.replace(origin, back=origin.back | back)
    weights = {
        _todays_name(name, config): _todays_layout(name, tensor)
        for name, tensor in checkpoint.weights.items()
    }
    return dataclasses.replace(checkpoint, origin=origin, weights=weights)


def _entry(entry: Any, config: ModelConfig) -> Any:
    """An entry of the way back, without the word on its layout."""
    if not isinstance(entry, list) or len(entry) != 6 or not isinstance(entry[0], str):
        return entry
    return [_todays_name(entry[0], config), *entry[1:3], *entry[4:]]


def _todays_name(name: str, config: ModelConfig) -> str:
    if name.startswith(PARTS):
        return name
    if config.shortcut == "avg_pool":  # the mean has a place of its own
        name = re.sub(r"(layer[234]\.0\.downsample\.)(\d)", lambda m: f"{m[1]}{int(m[2]) + 1}", name)
    for earlier, today in _aspp_names(config).items() if name.startswith("head.aspp.") else ():
        if name.startswith(f"head.aspp.{earlier}."):
            return f"{MODULE}head.aspp.{today}" + name.removeprefix(f"head.aspp.{earlier}")
    return MODULE + name


def _aspp_names(config: ModelConfig) -> dict[str, str]:
    """What names of an ASPP's layers began with, and begin with today; the first that fits counts."""
    count, pointwise = len(config.aspp_rates), 3 if config.aspp_separable == "normed" else 1
    names = {"point": "convs.0", "pool.0": f"convs.{count + 1}.1", "pool.1": f"convs.{count + 1}.2"}
    for branch in range(count):
        convolution, today = f"atrous.{branch}", f"convs.{branch + 1}"
        names |= {f"{convolution}.depthwise": f"{today}.0.0", f"{convolution}.norm": f"{today}.0.1"}
        names |= {f"{convolution}.pointwise": f"{today}.0.{pointwise}", convolution: f"{today}.0"}
        names[f"atrous_bn.{branch}"] = f"{today}.1"
    return names


def _todays_layout(name: str, tensor: Tensor) -> Tensor:
    """3x3 convolutions on rows were stored `[O, 3, 3, I]`, 1x1 ones `[O, I]`."""
    if _ROWS.fullmatch(name) and tensor.ndim == 4:
        return tensor.permute(0, 3, 1, 2).contiguous()
    is_point = tensor.ndim == 2 and name.startswith(EARLIER_PARTS)
    return tensor[:, :, None, None] if is_point else tensor
