"""Files of version 0.1, in today's terms: `.pt` of training, `.safetensors` of conversion.

A `.pt` file of training is still how its resumable state is kept (see `training/checkpoint.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_seg.checkpoint.content import ASIDE, IMAGENET_MEAN, IMAGENET_STD, Checkpoint, parse
from sparse_seg.checkpoint.digest import digest_of
from sparse_seg.data import DATASETS
from sparse_seg.errors import CheckpointError

CONVERTED = "sparse_seg.converted"
_CAD_NET, _CAD_LOGITS = "mask_net.", "mask_net.7."  # of conversions, with CAD's own two logits
_ORIGIN = {"arch": "", "has_head": True, "learned_net": "mask_net", "assumed": [], "back": {}}


def from_training(content: Mapping[str, Any], path: Path) -> Checkpoint:
    """A checkpoint from the content of a `.pt` file: averaged weights where training kept them.

    Raises:
        CheckpointError: an entry that is missing or impossible.
    """
    weights = _tensors(content.get("ema") or content.get("model"), path)
    config = content.get("config")
    model, data = (_mapping(config, part) for part in ("model", "data"))
    classifier = weights.get("module.head.classifier.weight", weights.get("head.classifier.weight"))
    if model.get("module") is not None:
        raise CheckpointError(f"{path} is to resume from; its network is in best.safetensors beside it")
    if not model or classifier is None or not classifier.ndim:
        raise CheckpointError(f"{path} is damaged: it holds no whole network with its config")
    classes = _class_list(data.get("dataset"), classifier.shape[0])
    description = {
        "version": content.get("version"),
        "model": dict(model) | {"num_classes": classifier.shape[0]},
        "classes": classes and list(classes.names),
        "colours": classes and [list(colour) for colour in classes.palette],
        "mean": data.get("mean"),
        "std": data.get("std"),
        "origin": _ORIGIN | {"source": "sparse_seg", "normalisation": "as trained"},
        "training": {"config": config},
    }
    return parse(description, weights, path, digest_of(weights))


def _class_list(dataset: Any, count: int) -> Any:
    """A dataset's classes, if it is known here and has as many."""
    known = DATASETS.get(dataset) if isinstance(dataset, str) else None
    return known.classes if known is not None and len(known.classes) == count else None


def from_conversion(metadata: Mapping[str, str], tensors: dict[str, Tensor], path: Path) -> Checkpoint:
    """A checkpoint from a converted file. It says nothing about mean and std.

    Raises:
        CheckpointError: an entry that is missing or impossible.
    """
    try:
        entries = json.loads(metadata["tensors"])
        renamed = {entry[0]: _new_name(entry[0], entry[1]) for entry in entries}
        back = {
            "entries": [[renamed[entry[0]], *entry[1:], 0] for entry in entries],
            "aliases": json.loads(metadata["aliases"]),
        }
        model, classes = json.loads(metadata["config"]), json.loads(metadata["classes"])
        source, arch, version = (metadata[key] for key in ("source", "arch", "version"))
        has_head = metadata["holds"] == "network"
        weights = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
        weights |= {
            name.replace(_CAD_NET, "policy.net."): tensor[:1] - tensor[1:]
            for name, tensor in tensors.items()
            if name.startswith(_CAD_LOGITS)
        }
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, RecursionError, RuntimeError):
        raise CheckpointError(f"{path} is damaged: what it says of itself cannot be read") from None
    description = {
        "version": version,
        "model": model,
        "classes": classes,
        "colours": None,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "origin": _ORIGIN
        | {
            **{"source": source, "arch": arch, "has_head": has_head, "back": back},
            **{"learned_net": "cad_mask_net", "normalisation": ""},
        },
        "training": {},
    }
    return parse(description, weights, path, digest_of(weights))


def _new_name(ours: str, theirs: str) -> str:
    if ours.startswith(_CAD_LOGITS):
        return ASIDE + theirs
    return "policy.net." + ours.removeprefix(_CAD_NET) if ours.startswith(_CAD_NET) else ours


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(f"{path} is damaged: its weights are no tensors by name")
    return dict(state)


def _mapping(tree: Any, key: str) -> Mapping[str, Any]:
    value = tree.get(key) if isinstance(tree, Mapping) else None
    return value if isinstance(value, Mapping) else {}
