"""torchvision: `models.segmentation.deeplabv3_resnet*`, `fcn_resnet*`, and the classifiers' backbones.

All segmentation networks of torchvision run at output stride 8; the classifiers at 32. timm's ResNets have
the same names, and its `d` variants (deep stem, avg-pool shortcuts) a few of their own.
"""

from __future__ import annotations

from sparse_seg.conversion.plan import AUXILIARY, CLASSIFIER, Pairs, Plan, Tensors, resnet_plan
from sparse_seg.errors import CheckpointError


def detect(tensors: Tensors) -> bool:
    """Whether the names are torchvision's."""
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        return True
    heads = ("classifier.0.convs.0.0.weight", "classifier.0.weight")
    return "backbone.conv1.weight" in tensors and any(name in tensors for name in heads)


def is_timm(tensors: Tensors) -> bool:
    """Whether the names are timm's alone; its plain ResNets are named, and are, as torchvision's."""
    return "layer1.0.conv1.weight" in tensors and "conv1.0.weight" in tensors


def plan(tensors: Tensors, output_stride: int | None) -> Plan:
    """See `Plan`.

    Raises:
        CheckpointError: not a ResNet, or an output stride that torchvision has not.
    """
    if "conv1.weight" in tensors:
        return classifier_plan(tensors, output_stride)
    if output_stride not in (None, 8):
        raise CheckpointError("torchvision's segmentation networks have output stride 8")
    has_aspp = "classifier.0.weight" not in tensors
    pairs: Pairs = [("head.aspp.", "classifier.0.")] if has_aspp else []
    pairs += [(f"head.refine.{part}.", f"classifier.{part + has_aspp}.") for part in (0, 1)]
    pairs.append(("head.classifier.", "classifier.4."))
    return resnet_plan(tensors, pairs, "backbone.", dropped={"aux_classifier.": AUXILIARY})


def classifier_plan(tensors: Tensors, output_stride: int | None) -> Plan:
    """A classifier's backbone (torchvision and timm name them alike).

    Raises:
        CheckpointError: not a ResNet, or an output stride is asked for.
    """
    if output_stride is not None:
        raise CheckpointError("--output-stride is for networks with a head: this is a backbone alone")
    assumed = "no anti-aliasing (timm's resnetaa and resnetblur have the same tensors, and are not supported)"
    result = resnet_plan(tensors, [], "", dropped={"fc.": CLASSIFIER}, assumed=[assumed])
    if result.config.get("shortcut") == "avg_pool":
        result.notes.append(
            "the 2x2 means of its shortcuts keep their distance in pixels at every stride, as the trained "
            "network (output stride 32) has them; timm's own dilated form keeps windows of one cell"
        )
    return result
