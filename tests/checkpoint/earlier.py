"""Files as version 0.1 wrote them."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from sparse_seg.checkpoint import load
from sparse_seg.config import to_dict

CAD = "backbone.mask_estimator."


def write_training(path: Path, config: Any, weights: Any, **state: Any) -> None:
    """`best.pt`, and with further `state` `last.pt`."""
    content = {"format": "sparse_seg.checkpoint", "version": "0.1.0", "config": to_dict(config)}
    torch.save(content | {"model": dict(weights)} | state, path)


def write_converted(path: Path, conversion: Any) -> None:
    """A converted file: a text per entry in the metadata, CAD's mask net with its own two logits."""
    conversion.write(path)
    checkpoint = load(path)
    origin, weights, entries = checkpoint.origin, {}, []
    for entry in origin.back["entries"]:
        ours, theirs = entry[:2]
        old = "mask_net." + theirs.removeprefix(CAD) if theirs.startswith(CAD) else ours
        weights[old] = checkpoint.weights[ours].clone()
        entries.append([old, *entry[1:5]])
    used = {entry[0] for entry in origin.back["entries"]}
    fresh = {name: tensor for name, tensor in checkpoint.weights.items() if name not in used}
    weights |= {name: tensor for name, tensor in fresh.items() if not name.startswith("policy.")}
    metadata = {
        "format": "sparse_seg.converted",
        "version": "0.1.0",
        "source": origin.source,
        "arch": origin.arch,
        "holds": "network" if origin.has_head else "backbone",
        "config": json.dumps(to_dict(checkpoint.config)),
        "classes": json.dumps(checkpoint.classes),
        "tensors": json.dumps(entries),
        "aliases": json.dumps(origin.back["aliases"]),
    }
    safetensors.torch.save_file(weights, path, metadata)
