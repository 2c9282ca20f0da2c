"""The sources by name: which one a state dict is of, and what contradicts that."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sparse_seg.conversion import cad, efficientnet, mmseg, smp, torchvision, vainf
from sparse_seg.conversion.plan import Plan, Tensors
from sparse_seg.conversion.reading import SourceFile
from sparse_seg.errors import CheckpointError, choose_one


class KnownSource(NamedTuple):
    """Whether tensors are named as the source's, and what to make of them, given the output stride that the
    caller names."""

    detect: Callable[[Tensors], bool]
    plan: Callable[[Tensors, int | None], Plan]


# in the order in which `auto` tries them: a file goes to the first that knows its names
SOURCES = {
    "mmseg": KnownSource(mmseg.detect, mmseg.plan),
    "smp": KnownSource(smp.detect, smp.plan),
    "cad": KnownSource(cad.detect, cad.plan),
    "vainf": KnownSource(vainf.detect, vainf.plan),
    "timm": KnownSource(torchvision.is_timm, torchvision.classifier_plan),
    "torchvision": KnownSource(torchvision.detect, torchvision.plan),
    "efficientnet": KnownSource(efficientnet.detect, efficientnet.plan),
}
# names do not tell CAD's dense networks from VainF's, nor timm's plain ResNets from torchvision's
TWINS = {"cad": (vainf.detect,), "timm": (torchvision.detect,)}


def is_known(tensors: Tensors) -> bool:
    """Whether names are those of a source."""
    return any(source.detect(tensors) for source in SOURCES.values())


def find_source(tensors: Tensors, asked: str = "auto") -> str:
    """The source whose names these are.

    Args:
        asked: its name, where the caller says it.

    Raises:
        CheckpointError: none that is known, or another one than is asked for.
    """
    if asked not in ("auto", *SOURCES):
        raise CheckpointError(f"unknown source {choose_one(asked, ['auto', *sorted(SOURCES)])}")
    if asked != "auto" and any(detect(tensors) for detect in (SOURCES[asked].detect, *TWINS.get(asked, ()))):
        return asked
    found = next((name for name, source in SOURCES.items() if source.detect(tensors)), None)
    if found is None:
        raise unknown(list(tensors))
    if asked != "auto":
        raise CheckpointError(f"its tensors are not named like {asked}'s but like {found}'s")
    return found


def unknown(names: Sequence[str]) -> CheckpointError:
    """The error of names that are of no source."""
    first, known = ", ".join(names[:3]), ", ".join(sorted(SOURCES))
    return CheckpointError(
        f"its names ({first}, ...) are of no network that can be converted; known are those of {known}"
    )


def check_file_name(file: SourceFile, plan: Plan, output_stride: int | None) -> None:
    """What tensors cannot tell is assumed only where no name says another: a stride, as CAD's `..._os16_...`
    does, or timm's ResNets that pool before strides, whose tensors are those of plain ones.

    Raises:
        CheckpointError: a name does.
    """
    for name in (file.path.name, file.arch):
        if found := re.search(r"resnet(aa|blur)\d+[a-z]?", name.lower()):
            raise CheckpointError(
                f"it is timm's {found[0]} by its name: that it pools before strides is not supported, and no "
                "tensor shows it; if it is another network, rename the file"
            )
    said = re.search(r"(?<![a-z])os(8|16)(?!\d)", file.path.name.lower())
    assumed = any(line.startswith("output stride") for line in plan.assumed)
    if output_stride is None and assumed and said and int(said[1]) != plan.config["trained_stride"]:
        raise CheckpointError(
            f"its tensors cannot tell the output stride, and its name says {said[1]}: add --output-stride "
            "8 or 16"
        )
