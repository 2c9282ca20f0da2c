"""VainF/DeepLabV3Plus-Pytorch: `deeplabv3_resnet*` and `deeplabv3plus_resnet*`, separable or not.

The tensors do not tell output stride 8 (ASPP rates 12, 24, 36) from 16 (6, 12, 18). The networks' functions
default to 8, the training script to 16.
"""

from __future__ import annotations

from sparse_seg.conversion.backbone import find_backbone
from sparse_seg.conversion.plan import (
    Options,
    Plan,
    Tensors,
    aspp_modules,
    assumed_stride,
    dense_conv_modules,
    output_channels,
    separable_names,
)


def detect(tensors: Tensors) -> bool:
    """Whether the names are VainF's (CAD's dense networks have the same)."""
    heads = ("classifier.classifier.0.convs.0.0.weight", "classifier.aspp.convs.0.0.weight")
    return "backbone.conv1.weight" in tensors and any(name in tensors for name in heads)


def plan(tensors: Tensors, options: Options) -> Plan:
    """See `Plan`."""
    backbone = find_backbone(tensors, "backbone.")
    stride, assumed = assumed_stride(options, 8)
    result = Plan("", backbone.config, backbone.modules, assumed=assumed)
    name = add_head(result, tensors, stride)
    result.arch = f"{name}_{backbone.name}"
    return result


def add_head(result: Plan, tensors: Tensors, stride: int) -> str:
    """Complete a backbone's plan by the head, run at `stride`; returns its name."""
    plus = "classifier.aspp.convs.0.0.weight" in tensors
    prefix = "classifier.aspp." if plus else "classifier.classifier.0."
    aspp, rates, aspp_separable = aspp_modules(tensors, prefix)
    result.modules |= aspp
    result.config |= {
        "head": "deeplabv3plus" if plus else "deeplabv3",
        "head_channels": output_channels(tensors, f"{prefix}convs.0.0.weight"),
        "aspp_rates": [96 // stride * (index + 1) for index in range(rates)],
        "aspp_separable": aspp_separable,
        "trained_stride": stride,
    }
    if plus:
        _add_decoder(result, tensors)
    else:
        modules, separable = dense_conv_modules(
            tensors, "head.refine.", "classifier.classifier.1", "classifier.classifier.2"
        )
        result.modules |= modules | {"head.classifier": "classifier.classifier.4"}
        result.config |= {"separable": separable}
    last = "classifier.classifier.3.weight" if plus else "classifier.classifier.4.weight"
    result.config |= {"num_classes": output_channels(tensors, last)}
    return result.config["head"]


def _add_decoder(result: Plan, tensors: Tensors) -> None:
    """deeplabv3plus: no 3x3 after ASPP, one after the skip, whose channels stand before ASPP's."""
    conv = "classifier.classifier.0"
    modules, separable = dense_conv_modules(tensors, "head.decoder.0.", conv, "classifier.classifier.1")
    result.modules |= modules | {
        "head.low_level.0": "classifier.project.0",
        "head.low_level.1": "classifier.project.1",
        "head.classifier": "classifier.classifier.3",
    }
    skip = output_channels(tensors, "classifier.project.0.weight")
    result.config |= {"refine": False, "low_level_channels": skip, "separable": separable}
    if separable_names(tensors, conv):
        result.rolls["head.decoder.0.0.weight"] = (0, skip)
        result.rolls["head.decoder.0.1.weight"] = (1, skip)
    else:
        result.rolls["head.decoder.0.0.weight"] = (1, skip)
