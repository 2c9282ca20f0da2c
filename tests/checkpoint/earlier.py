"""Files as version 0.1 wrote them, and weights as formats up to 2 had them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sparse_seg.checkpoint import digest_of, load
from sparse_seg.config import ModelConfig, model_config, to_dict
from tests.checkpoint.stored import header_of, opened, packed

ON_ROWS = re.compile(r"backbone\.layer|head\.aspp|head\.reduce")
CAD = "backbone.mask_estimator."


def old_weights(weights: Mapping[str, Tensor], settings: ModelConfig) -> dict[str, Tensor]:
    """A network's tensors by the names, and in the layouts, that a network on rows had."""
    renamed = {old_name(name, settings): tensor for name, tensor in weights.items()}
    return {name: _old_layout(name, tensor).contiguous() for name, tensor in renamed.items()}


def old_name(name: str, settings: ModelConfig) -> str:
    name, last = name.removeprefix("module."), len(settings.aspp_rates) + 1
    if settings.shortcut == "avg_pool" and not name.startswith("backbone.layer1"):
        name = re.sub(r"downsample\.(\d)", lambda found: f"downsample.{int(found[1]) - 1}", name)
    names = {"convs.0.": "point.", f"convs.{last}.1.": "pool.0.", f"convs.{last}.2.": "pool.1."}
    parts = {"0": "depthwise", "1": "norm" if settings.aspp_separable == "normed" else "pointwise"}
    parts["3"] = "pointwise"
    for index in range(last - 1):
        branch = f"convs.{index + 1}."
        names[f"{branch}1."] = f"atrous_bn.{index}."
        if settings.aspp_separable == "none":
            names[f"{branch}0."] = f"atrous.{index}."
        else:
            names |= {f"{branch}0.{place}.": f"atrous.{index}.{part}." for place, part in parts.items()}
    for new, old in names.items():
        if name.startswith(f"head.aspp.{new}"):
            return "head.aspp." + old + name.removeprefix(f"head.aspp.{new}")
    return name


def _old_layout(name: str, tensor: Tensor) -> Tensor:
    """`[O, 3, 3, I]` and `[O, I]` of convolutions on rows."""
    if not ON_ROWS.match(name) or tensor.ndim != 4:
        return tensor
    return tensor.permute(0, 2, 3, 1) if is_krsc(name, tensor) else tensor.flatten(1)


def write_training(path: Path, config: Any, weights: Mapping[str, Tensor], **state: Any) -> None:
    """`best.pt`, and with further `state`, of which `ema` are weights, `last.pt`."""
    settings, content = model_config(config), {"format": "sparse_seg.checkpoint", "version": "0.1.0"}
    weights = {"model": weights} | {name: state.pop(name) for name in ("ema",) if name in state}
    old = {name: old_weights(one, settings) for name, one in weights.items()}
    torch.save(content | {"config": to_dict(config)} | old | state, path)


def write_format_2(path: Path, conversion: Any) -> None:
    """A converted file without a graph: the entries of the way back tell old layouts, too. Of CAD's mask net
    only the two logits stood aside."""
    conversion.write(path)
    weights, content = opened(path)[0], header_of(path)
    entries = content["origin"]["back"]["entries"]
    for entry in entries:
        if entry[1].startswith(CAD) and not entry[1].startswith(f"{CAD}7."):
            del weights[entry[0]]
            entry[0] = "policy.net." + entry[1].removeprefix(CAD)
    old = old_weights(weights, conversion.checkpoint.config)
    for entry in entries:
        name = old_name(entry[0], conversion.checkpoint.config)
        entry[0], entry[3:] = name, [is_krsc(name, weights[entry[0]]), *entry[3:]]
    del content["graph"]
    path.write_bytes(packed(old, content | {"format_version": 2, "weights": digest_of(old)}))


def write_converted(path: Path, conversion: Any) -> None:
    """Version 0.1: a text per entry in the metadata, CAD's mask net with its own two logits."""
    conversion.write(path)
    checkpoint = load(path)
    origin, entries = checkpoint.origin, []
    weights = old_weights(checkpoint.weights, checkpoint.config)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("policy.")}
    for ours, theirs, shape, roll, _ in origin.back["entries"]:
        own = old_name(ours, checkpoint.config)
        name = "mask_net." + theirs.removeprefix(CAD) if theirs.startswith(CAD) else own
        weights[name] = weights.pop(own)
        entries.append([name, theirs, shape, is_krsc(own, checkpoint.weights[ours]), roll])
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


def is_krsc(name: str, tensor: Tensor) -> bool:
    return ON_ROWS.match(name) is not None and tensor.shape[2:] == (3, 3)
