"""VainF/DeepLabV3Plus-Pytorch: `deeplabv3_resnet*` and `deeplabv3plus_resnet*`, separable or not.

The tensors do not tell output stride 8 (ASPP rates 12, 24, 36) from 16 (6, 12, 18). The networks' functions
default to 8, the training script to 16.
"""

from __future__ import annotations

from sparse_seg.conversion.plan import Pairs, Plan, Tensors, assumed_stride, conv_names, resnet_plan

SEQUENCE = "classifier.classifier"


def detect(tensors: Tensors) -> bool:
    """Whether the names are VainF's (CAD's dense networks have the same)."""
    heads = (f"{SEQUENCE}.0.convs.0.0.weight", "classifier.aspp.convs.0.0.weight")
    return "backbone.conv1.weight" in tensors and any(name in tensors for name in heads)


def plan(tensors: Tensors, output_stride: int | None) -> Plan:
    """See `Plan`."""
    return plan_at(tensors, *assumed_stride(output_stride, 8))


def plan_at(tensors: Tensors, stride: int, assumed: list[str], special: Pairs | None = None) -> Plan:
    """The plan of a network trained at `stride`, with `special` names of its backbone."""
    pairs = [*(special or []), *_head_names(tensors)]
    result = resnet_plan(tensors, pairs, "backbone.", stride, assumed=assumed)
    if result.config["head"] == "deeplabv3plus":  # the skip's channels stand before ASPP's, in ours behind
        skip, depthwise = result.config["low_level_channels"], result.config["separable"] != "none"
        result.rolls["head.decoder.0.0.weight"] = (0 if depthwise else 1, skip)
        result.rolls |= {"head.decoder.0.1.weight": (1, skip)} if depthwise else {}
    return result


def is_fcn(tensors: Tensors) -> bool:
    """Whether the head is CAD's fcn, which VainF has not."""
    return f"{SEQUENCE}.0.weight" in tensors and "classifier.project.0.weight" not in tensors


def _head_names(tensors: Tensors) -> Pairs:
    if is_fcn(tensors):
        return [("head.classifier.", f"{SEQUENCE}.4."), ("head.refine.#.", f"{SEQUENCE}.#.")]
    if f"{SEQUENCE}.0.convs.0.0.weight" in tensors:
        aspp, last = f"{SEQUENCE}.0.", f"{SEQUENCE}.4."
        conv = conv_names(tensors, "head.refine", f"{SEQUENCE}.1", f"{SEQUENCE}.2")
    else:  # no 3x3 after ASPP, one after the skip
        aspp, last = "classifier.aspp.", f"{SEQUENCE}.3."
        conv = conv_names(tensors, "head.decoder.0", f"{SEQUENCE}.0", f"{SEQUENCE}.1")
        conv.append(("head.low_level.", "classifier.project."))
    body = ("head.aspp.convs.#.0.#.", f"{aspp}convs.#.0.body.#.")
    return [body, ("head.aspp.", aspp), *conv, ("head.classifier.", last)]
