"""torchvision: `models.segmentation.deeplabv3_resnet*`, `fcn_resnet*`, and the classifiers' backbones.

All segmentation networks of torchvision run at output stride 8; the classifiers at 32.
"""

from __future__ import annotations

from sparse_seg.conversion.backbone import find_backbone
from sparse_seg.conversion.plan import (
    AUXILIARY,
    CLASSIFIER,
    Options,
    Plan,
    Tensors,
    aspp_modules,
    output_channels,
)
from sparse_seg.errors import CheckpointError


def detect(tensors: Tensors) -> bool:
    """Whether the names are torchvision's."""
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        return True
    heads = ("classifier.0.convs.0.0.weight", "classifier.0.weight")
    return "backbone.conv1.weight" in tensors and any(name in tensors for name in heads)


def plan(tensors: Tensors, options: Options) -> Plan:
    """See `Plan`.

    Raises:
        CheckpointError: not a ResNet, or an output stride that torchvision has not.
    """
    if "conv1.weight" in tensors:
        return classifier_plan(tensors, options)
    if options.output_stride not in (None, 8):
        raise CheckpointError("torchvision's segmentation networks have output stride 8")
    backbone = find_backbone(tensors, "backbone.")
    config = backbone.config | {"num_classes": output_channels(tensors, "classifier.4.weight")}
    modules = backbone.modules | {"head.classifier": "classifier.4"}
    if "classifier.0.weight" in tensors:
        name, refine = "fcn", {"head.refine.0": "classifier.0", "head.refine.1": "classifier.1"}
        config |= {"head": "fcn", "head_channels": output_channels(tensors, "classifier.0.weight")}
        modules |= refine
    else:
        name, refine = "deeplabv3", {"head.refine.0": "classifier.1", "head.refine.1": "classifier.2"}
        aspp, rates, _ = aspp_modules(tensors, "classifier.0.")
        modules |= aspp | refine
        channels = output_channels(tensors, "classifier.0.convs.0.0.weight")
        config |= {"head": "deeplabv3", "head_channels": channels}
        config |= {"aspp_rates": [12 * (i + 1) for i in range(rates)]}
    return Plan(f"{name}_{backbone.name}", config, modules, dropped={"aux_classifier.": AUXILIARY})


def classifier_plan(tensors: Tensors, options: Options) -> Plan:
    """A classifier's backbone (torchvision and timm name them alike).

    Raises:
        CheckpointError: not a ResNet, or an output stride is asked for.
    """
    if options.output_stride is not None:
        raise CheckpointError("--output-stride is for networks with a head: this is a backbone alone")
    backbone = find_backbone(tensors)
    result = Plan(backbone.name, backbone.config, backbone.modules, dropped={"fc.": CLASSIFIER})
    result.has_head = False
    result.assumed.append(
        "no anti-aliasing (timm's resnetaa and resnetblur have the same tensors, and are not supported)"
    )
    if backbone.config.get("shortcut") == "avg_pool":
        result.notes.append(
            "the 2x2 means of its shortcuts keep their distance in pixels at every stride, as the trained "
            "network (output stride 32) has them; timm's own dilated form keeps windows of one cell"
        )
    return result
