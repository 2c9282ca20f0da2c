"""ResNets in the naming that all sources share (torchvision's), read from the tensors alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse_seg.conversion.plan import Tensors, count_modules, output_channels
from sparse_seg.errors import CheckpointError

WIDTH = 64  # channels of the stem of all
BASIC = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}  # blocks of each stage
BOTTLENECK = {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}


@dataclass(frozen=True)
class Backbone:
    """A ResNet found in a state dict.

    Args:
        config: its model settings.
        modules: ours to theirs.
        name: as `resnet50`, with a `d` or `c` for a deep stem with or without avg-pool shortcuts.
        basic: whether it has basic blocks.
    """

    config: dict[str, Any]
    modules: dict[str, str]
    name: str
    basic: bool


def find_backbone(tensors: Tensors, prefix: str = "") -> Backbone:
    """The ResNet whose names start with `prefix` (with its dot).

    Raises:
        CheckpointError: the tensors do not belong to a ResNet that can be built here.
    """
    depths = [count_modules(tensors, f"{prefix}layer{stage}.") for stage in (1, 2, 3, 4)]
    stem, last_stem = _stem_modules(tensors, prefix)
    if not all(depths) or last_stem not in tensors:
        raise CheckpointError(f"it has no ResNet under '{prefix}': {prefix}layer1.0.conv1 and others lack")
    basic = f"{prefix}layer1.0.conv3.weight" not in tensors
    downsample = f"{prefix}layer2.0.downsample."
    pooled = f"{downsample}1.weight" in tensors and tensors[f"{downsample}1.weight"].ndim > 1

    modules = {f"backbone.{ours}": f"{prefix}{theirs}" for ours, theirs in stem.items()}
    parts = ("conv1", "bn1", "conv2", "bn2", *(() if basic else ("conv3", "bn3")))
    for stage, depth in enumerate(depths, start=1):
        for block in (f"layer{stage}.{index}." for index in range(depth)):
            modules |= {f"backbone.{block}{part}": f"{prefix}{block}{part}" for part in parts}
        first = f"layer{stage}.0.downsample."
        if stage > 1 or any(name.startswith(prefix + first) for name in tensors):
            for part in (0, 1):  # behind the mean, of which layer1 has none: timm has an identity there
                ours = f"backbone.{first}{part + (pooled and stage > 1)}"
                modules[ours] = f"{prefix}{first}{part + pooled}"

    width = output_channels(tensors, last_stem) / WIDTH
    config: dict[str, Any] = _named(depths, basic) | ({} if width == 1 else {"width": width})
    deep = "deep" if len(stem) > 2 else "conv7"
    config |= {"stem": deep} if deep == "deep" else {}
    config |= {"shortcut": "avg_pool"} if pooled else {}
    suffix = "d" if pooled else "c" if deep == "deep" else ""
    return Backbone(config, modules, config["backbone"] + suffix, basic)


def _stem_modules(tensors: Tensors, prefix: str) -> tuple[dict[str, str], str]:
    """Our stem modules to theirs, and the weight of its last convolution."""
    if f"{prefix}stem.0.weight" in tensors:  # mmsegmentation
        names = {f"conv1.{part}": f"stem.{part}" for part in (0, 1, 3, 4, 6)}
        return names | {"bn1": "stem.7"}, f"{prefix}stem.6.weight"
    if f"{prefix}conv1.0.weight" in tensors:  # timm
        names = {f"conv1.{part}": f"conv1.{part}" for part in (0, 1, 3, 4, 6)}
        return names | {"bn1": "bn1"}, f"{prefix}conv1.6.weight"
    return {"conv1": "conv1", "bn1": "bn1"}, f"{prefix}conv1.weight"


def _named(depths: list[int], basic: bool) -> dict[str, Any]:
    """The named backbone of these depths, or the nearest with `depths` of its own."""
    candidates = BASIC if basic else BOTTLENECK
    for name, own in candidates.items():
        if own == depths:
            return {"backbone": name}
    nearest = min(candidates, key=lambda name: abs(sum(candidates[name]) - sum(depths)))
    return {"backbone": nearest, "depths": depths}
