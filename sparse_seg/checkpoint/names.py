"""Weights of files up to format 2, whose networks kept layouts of their own, by today's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from sparse_seg.checkpoint.content import ASIDE, CONSTANTS, MODULE, POLICY, Checkpoint
from sparse_seg.config import ModelConfig

ROWS = re.compile(r"backbone\.layer\d\.\d+\.conv\d\.weight|head\.aspp\.atrous\.\d+\.(depthwise\.)?weight")


def as_today(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of any format, as this version writes it."""
    entries = checkpoint.origin.back.get("entries")
    if isinstance(entries, list):
        entries = [_entry(entry, checkpoint.config) for entry in entries]
        origin = replace(checkpoint.origin, back=checkpoint.origin.back | {"entries": entries})
        checkpoint = replace(checkpoint, origin=origin)
    return replace(checkpoint, weights=todays(checkpoint.weights, checkpoint.config))


def _entry(entry: Any, config: ModelConfig) -> Any:
    """An entry of the way back, without the word on its layout."""
    if not isinstance(entry, list) or len(entry) != 6 or not isinstance(entry[0], str):
        return entry
    return [todays_name(entry[0], config), *entry[1:3], *entry[4:]]


def todays(weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A network's tensors as its module has them."""
    return {todays_name(name, config): _todays_layout(name, tensor) for name, tensor in weights.items()}


def todays_name(name: str, config: ModelConfig) -> str:
    if name.startswith((MODULE, CONSTANTS, POLICY, ASIDE)):
        return name
    if config.shortcut == "avg_pool":  # the mean has a place of its own
        name = re.sub(r"(layer[234]\.0\.downsample\.)(\d)", lambda m: f"{m[1]}{int(m[2]) + 1}", name)
    part, _, own = name.partition("head.aspp.")
    return MODULE + (part + "head.aspp." + _aspp(own, config) if own else name)


def _aspp(name: str, config: ModelConfig) -> str:
    count, pointwise = len(config.aspp_rates), "3" if config.aspp_separable == "normed" else "1"
    kind, _, rest = name.partition(".")
    if kind == "point":
        return f"convs.0.{rest}"
    if kind == "pool":
        place, _, leaf = rest.partition(".")
        return f"convs.{count + 1}.{int(place) + 1}.{leaf}"
    if kind not in ("atrous", "atrous_bn"):
        return name
    branch, _, leaf = rest.partition(".")
    if kind == "atrous_bn":
        return f"convs.{int(branch) + 1}.1.{leaf}"
    for own, place in (("depthwise", "0"), ("norm", "1"), ("pointwise", pointwise)):
        if leaf.startswith(f"{own}."):
            leaf = leaf.replace(own, place, 1)
    return f"convs.{int(branch) + 1}.0.{leaf}"


def _todays_layout(name: str, tensor: Tensor) -> Tensor:
    """3x3 convolutions on rows were stored `[O, 3, 3, I]`, 1x1 ones `[O, I]`."""
    if ROWS.fullmatch(name) and tensor.ndim == 4:
        return tensor.permute(0, 3, 1, 2).contiguous()
    is_point = tensor.ndim == 2 and name.startswith(("backbone.", "head.", "auxiliary."))
    return tensor[:, :, None, None] if is_point else tensor
