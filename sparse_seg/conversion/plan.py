"""What every source tells about a state dict: the network it is, and which tensor is which of ours.

Our networks are plain modules of PyTorch, so a source is a table of names: once its tensors bear ours,
`resnet_plan` reads from them all that tensors can tell, whatever the source.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparse_seg.errors import CheckpointError

Tensors = Mapping[str, Tensor]
Pairs = list[tuple[str, str]]
AUXILIARY = "auxiliary head, used in training only"
CLASSIFIER = "classifier of images"

WIDTH = 64  # channels of the stem of all ResNets
BASIC = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}  # blocks of each stage
BOTTLENECK = {"resnet50": [3, 4, 6, 3], "resnet101": [3, 4, 23, 3]}


class Renamed:
    """A source's state dict by our names.

    Args:
        tensors: by the source's names.
        pairs: what ours and the source's names begin with, `#` for a number; the first pair that fits counts.

    Attributes:
        theirs: our name of each tensor to the source's.
    """

    def __init__(self, tensors: Tensors, pairs: Pairs) -> None:
        self.tensors, self.pairs = tensors, pairs
        backward = [(theirs, ours) for ours, theirs in pairs]
        found = {name: _translated(name, backward) for name in tensors}
        self.theirs = {ours: name for name, ours in found.items() if ours is not None}

    def __contains__(self, module: str) -> bool:
        return f"{module}.weight" in self.theirs

    def source_name(self, ours: str) -> str:
        """The source's name of a tensor of ours, which it may lack."""
        return self.theirs.get(ours) or _translated(ours, self.pairs) or ours

    def shape(self, module: str) -> tuple[int, ...]:
        """Of a module's weight.

        Raises:
            CheckpointError: there is no such tensor.
        """
        name = self.source_name(f"{module}.weight")
        if name not in self.tensors or not self.tensors[name].ndim:
            raise CheckpointError(f"{name} is missing")
        return tuple(self.tensors[name].shape)

    def count(self, module: str) -> int:
        """How many numbered modules it has."""
        return count_modules(self.theirs, f"{module}.")

    def separable(self, module: str) -> str:
        """How a 3x3 with its norm is made: plain, or depthwise and 1x1, with a norm between or not."""
        if f"{module}.3" in self:
            return "normed"
        return "linear" if f"{module}.1" in self and len(self.shape(f"{module}.1")) > 1 else "none"


def _translated(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    for before, after in pairs:
        found = re.match(re.escape(before).replace(r"\#", r"(\d+)"), name)
        if found is not None:
            numbers = iter(found.groups())
            return re.sub("#", lambda _: next(numbers), after) + name[found.end() :]  # noqa: B023
    return None


def count_modules(names: Iterable[str], prefix: str) -> int:
    """How many numbered modules stand under `prefix`, which ends with a dot."""
    numbers = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    return sum(number.isdecimal() for number in numbers)


@dataclass
class Plan:
    """How to convert a state dict.

    Args:
        own: its tensors by our names.
        arch: the source's name for the network, such as `deeplabv3_resnet50`.
        config: model settings, as `ModelConfig` has them; only what differs from its defaults.
        rolls: our tensors whose channels the source has in another order: (axis, how many of the source's
            first channels stand last in ours). Axes are those of the source's tensor.
        dropped: prefix of the source's names to the reason why the network needs no such tensors.
        added: our tensors that begin with a row that the source lacks, and its value.
        threshold: of a network of one logit, the probability above which a pixel is foreground.
        fresh: tensors of CAD's mask net, by a file's names of ours, made from the source's.
        classes: names of the classes, where the source implies them.
        aliases: the source's name to another of its names, which has the very same values.
        assumed: what the tensors cannot tell and what was taken for it, one line each.
        notes: further lines for the report.
    """

    own: Renamed
    arch: str
    config: dict[str, Any]
    rolls: dict[str, tuple[int, int]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    added: dict[str, float] = field(default_factory=dict)
    threshold: float = 0.5
    fresh: dict[str, Tensor] = field(default_factory=dict)
    classes: list[str] | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def has_head(self) -> bool:
        """False of a backbone alone."""
        return "num_classes" in self.config

    def reason(self, name: str) -> str | None:
        """Why the network does not need a tensor of the source's."""
        return next((why for prefix, why in self.dropped.items() if name.startswith(prefix)), None)


def resnet_plan(
    tensors: Tensors, pairs: Pairs, prefix: str, stride: int = 8, rate: int | None = None, **said: Any
) -> Plan:
    """The plan of a ResNet and its head.

    Args:
        pairs: names of what is special, none without a head; prefix: of the ResNet's, with its dot, by
            torchvision's names.
        stride: the output stride that it was trained at.
        rate: the smallest dilation of ASPP, of which the others are multiples; None: 96 px at `stride`.
        said: further fields of the `Plan`.

    Raises:
        CheckpointError: a part that tells settings is missing.
    """
    stem, first = f"{prefix}stem.", f"{prefix}layer1.0.downsample."
    backbone = [("backbone.", prefix)]
    if f"{stem}0.weight" in tensors:  # mmsegmentation
        backbone = [("backbone.bn1.", f"{stem}7."), ("backbone.conv1.", stem), *backbone]
    if f"{first}2.weight" in tensors:  # timm: behind a mean, which is an identity in layer1
        shift = [(f"backbone.layer1.0.downsample.{part}.", f"{first}{part + 1}.") for part in (0, 1)]
        backbone = [*shift, *backbone]
    own = Renamed(tensors, [*pairs, *backbone])
    name, config = _backbone_settings(own)
    if not pairs:
        return Plan(own, name, config, **said)
    config |= _head_settings(own, rate or 96 // stride) | {"trained_stride": stride}
    return Plan(own, f"{config['head']}_{name}", config, **said)


def _backbone_settings(own: Renamed) -> tuple[str, dict[str, Any]]:
    """The ResNet's name, and what its tensors tell."""
    depths = [own.count(f"backbone.layer{stage}") for stage in (1, 2, 3, 4)]
    if not all(depths):
        missing = own.source_name(f"backbone.layer{depths.index(0) + 1}.0.conv1.weight")
        raise CheckpointError(f"it has no whole ResNet: {missing} is missing")
    named = BASIC if "backbone.layer1.0.conv3" not in own else BOTTLENECK
    name = min(named, key=lambda one: abs(sum(named[one]) - sum(depths)))
    width, shortcut = own.shape("backbone.bn1")[0] / WIDTH, own.shape("backbone.layer2.0.downsample.1")
    deep, pooled = "backbone.conv1.0" in own, len(shortcut) > 1
    config: dict[str, Any] = {"backbone": name}
    config |= {"depths": depths} if named[name] != depths else {}
    config |= {"width": width} if width != 1 else {}
    config |= {"stem": "deep"} if deep else {}
    config |= {"shortcut": "avg_pool"} if pooled else {}
    return name + ("d" if pooled else "c" if deep else ""), config


def _head_settings(own: Renamed, rate: int) -> dict[str, Any]:
    config: dict[str, Any] = {"num_classes": own.shape("head.classifier")[0]}
    count, refine = own.count("head.aspp.convs"), own.separable("head.refine")
    if not count:
        return config | {"head": "fcn", "head_channels": own.shape("head.refine.0")[0]}
    config |= {
        "head": "deeplabv3",
        "head_channels": own.shape("head.aspp.convs.0.0")[0],
        "aspp_rates": [rate * (index + 1) for index in range(count - 2)],
        "aspp_separable": own.separable("head.aspp.convs.1.0"),
        "aspp_projection": "head.aspp.project.0" in own,
        "separable": refine,
    }
    if not own.count("head.decoder"):
        return config
    separable = own.separable("head.decoder.0")
    config |= {
        "head": "deeplabv3plus",
        "refine": "head.refine.0" in own,
        "separable": separable,
        "low_level_channels": own.shape("head.low_level.0")[0],
        "decoder_convs": own.count("head.decoder"),
    }
    return config | ({"refine_separable": refine} if config["refine"] and refine != separable else {})


def conv_names(tensors: Tensors, ours: str, conv: str, norm: str) -> Pairs:
    """Names of a 3x3 and its norm; a separable one has its parts under itself (smp) or `body` (VainF)."""
    part = next((one for one in (f"{conv}.", f"{conv}.body.") if f"{one}0.weight" in tensors), None)
    layers = [conv, norm] if part is None else [f"{part}0", f"{part}1", norm]
    return [(f"{ours}.{place}.", f"{layer}.") for place, layer in enumerate(layers)]


def assumed_stride(asked: int | None, default: int) -> tuple[int, list[str]]:
    """The output stride asked for or the source's default, and the line that says so."""
    if asked is not None:
        return asked, []
    other = 24 - default
    return default, [f"output stride {default} (tensors cannot tell; else use --output-stride {other})"]


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
