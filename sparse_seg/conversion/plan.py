"""What every source tells about a state dict: the network it is, and which tensor is which of ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparse_seg.errors import CheckpointError

Tensors = Mapping[str, Tensor]
AUXILIARY = "auxiliary head, used in training only"
CLASSIFIER = "classifier of images"


@dataclass
class Options:
    """What tensors cannot tell, from the user; None where the source's default is meant."""

    output_stride: int | None = None


@dataclass
class Plan:
    """How to convert a state dict.

    Args:
        arch: the source's name for the network, such as `deeplabv3_resnet50`.
        config: model settings, as `ModelConfig` has them; only what differs from its defaults.
        modules: our module (as `head.aspp.convs.0.0`) to the source's; every module of ours with tensors.
        rolls: our tensors whose channels the source has in another order: (axis, how many of the source's
            first channels stand last in ours). Axes are those of the source's tensor.
        dropped: prefix of the source's names to the reason why the network needs no such tensors.
        added: our tensors that begin with a row that the source lacks, and its value.
        threshold: of a network of one logit, the probability above which a pixel is foreground.
        kept: prefix of the source's names to our prefix, for tensors that not every policy needs.
        fresh: our tensors, by a file's names, that are made from the source's, which stay for the way back.
        learned_net: which net `kept` and `fresh` are of, see `checkpoint/loading.py`.
        classes: names of the classes, where the source implies them.
        aliases: the source's name to another of its names, which has the very same values.
        assumed: what the tensors cannot tell and what was taken for it, one line each.
        notes: further lines for the report.
        has_head: False for a backbone alone.
    """

    arch: str
    config: dict[str, Any]
    modules: dict[str, str]
    rolls: dict[str, tuple[int, int]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    added: dict[str, float] = field(default_factory=dict)
    threshold: float = 0.5
    kept: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, Tensor] = field(default_factory=dict)
    learned_net: str = "mask_net"
    classes: list[str] | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    has_head: bool = True


def as_two_classes(plan: Plan, told: float | None) -> None:
    """Make two classes of a network of one logit, by a background whose logit is the same everywhere: its
    value is the foreground's at the threshold, so the same pixels are foreground.

    Args:
        told: the threshold, by the user.
    """
    threshold = plan.threshold if told is None else told
    level = math.log(threshold / (1 - threshold))
    plan.added = {"head.classifier.weight": 0.0, "head.classifier.bias": level}
    plan.config["num_classes"], plan.classes = 2, ["background", "foreground"]
    plan.notes.append(f"its one logit is now class 1's (foreground); class 0's is always {level:.4g}")
    if told is None:
        plan.assumed.append(f"foreground above probability {threshold:g} (else use --threshold)")


def count_modules(tensors: Tensors, prefix: str) -> int:
    """How many numbered modules stand under `prefix`, which ends with a dot."""
    numbers = {name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)}
    return len([number for number in numbers if number.isdecimal()])


def output_channels(tensors: Tensors, name: str) -> int:
    """First size of a tensor.

    Raises:
        CheckpointError: there is no such tensor.
    """
    if name not in tensors or not tensors[name].ndim:
        raise CheckpointError(f"{name} is missing")
    return tensors[name].shape[0]


def assumed_stride(options: Options, default: int) -> tuple[int, list[str]]:
    """The output stride asked for or the source's default, and the line that says so."""
    if options.output_stride is not None:
        return options.output_stride, []
    other = 24 - default
    return default, [f"output stride {default} (tensors cannot tell; else use --output-stride {other})"]


def aspp_modules(tensors: Tensors, theirs: str) -> tuple[dict[str, str], int, str]:
    """Modules of ASPP in torchvision's naming, which smp, VainF and CAD share.

    Args:
        theirs: prefix of `convs.0.0`, with its dot.

    Returns:
        Our modules to theirs, the count of rates, and which separable form it has.
    """
    rates = count_modules(tensors, f"{theirs}convs.") - 2
    pool = f"convs.{rates + 1}"
    same = ["convs.0.0", "convs.0.1", f"{pool}.1", f"{pool}.2", "project.0", "project.1"]
    modules, separable = {f"head.aspp.{name}": f"{theirs}{name}" for name in same}, "none"
    for index in range(1, rates + 1):
        conv = f"convs.{index}.0"
        parts = separable_names(tensors, f"{theirs}{conv}")
        modules |= {f"head.aspp.{conv}.{place}": part for place, part in enumerate(parts)}
        separable = "linear" if parts else separable
        whole = [f"convs.{index}.1"] if parts else [conv, f"convs.{index}.1"]
        modules |= {f"head.aspp.{name}": f"{theirs}{name}" for name in whole}
    return modules, rates, separable


def separable_names(tensors: Tensors, conv: str) -> list[str]:
    """Names of the depthwise and pointwise parts of a convolution (smp: 0, 1; VainF: body.0, body.1)."""
    for parts in (("0", "1"), ("body.0", "body.1")):
        if f"{conv}.{parts[0]}.weight" in tensors:
            return [f"{conv}.{part}" for part in parts]
    return []


def dense_conv_modules(tensors: Tensors, ours: str, conv: str, norm: str) -> tuple[dict[str, str], str]:
    """Modules of a dense 3x3 with its norm, plain or separable, and which of the two it is.

    Args:
        ours: prefix of our sequence, such as `head.refine.`.
        conv, norm: the source's modules.
    """
    names = separable_names(tensors, conv)
    if not names:
        return {f"{ours}0": conv, f"{ours}1": norm}, "none"
    return {f"{ours}0": names[0], f"{ours}1": names[1], f"{ours}2": norm}, "linear"
