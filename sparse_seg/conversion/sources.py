"""The sources by name: which one a state dict is of, and what contradicts that."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import ModuleType

from sparse_seg.conversion import cad, efficientnet, mmseg, smp, timm, torchvision, vainf
from sparse_seg.conversion.naming import Named
from sparse_seg.conversion.plan import Plan, Tensors
from sparse_seg.conversion.reading import SourceFile
from sparse_seg.errors import CheckpointError, choose_one

# in the order in which `auto` tries them: a file goes to the first that knows its names
SOURCES: dict[str, ModuleType] = {
    "mmseg": mmseg,
    "smp": smp,
    "cad": cad,
    "vainf": vainf,
    "timm": timm,
    "torchvision": torchvision,
    "efficientnet": efficientnet,
}


def is_known(tensors: Tensors) -> bool:
    """Whether names are those of a source."""
    return any(module.detect(tensors) for module in SOURCES.values())


def find_source(tensors: Tensors) -> str:
    """The source whose names these are.

    Raises:
        CheckpointError: none that is known.
    """
    for name, module in SOURCES.items():
        if module.detect(tensors):
            return name
    raise unknown(list(tensors))


def unknown(names: Sequence[str]) -> CheckpointError:
    """The error of names that are of no source."""
    first, known = ", ".join(names[:3]), ", ".join(sorted(SOURCES))
    return CheckpointError(
        f"its names ({first}, ...) are of no network that can be converted; known are those of {known}"
    )


def asked_source(tensors: Tensors, source: str) -> str:
    """The source by its name, if the tensors may be its own.

    Raises:
        CheckpointError: they are not, or there is no such source.
    """
    if source not in SOURCES:
        raise CheckpointError(f"unknown source {choose_one(source, ['auto', *sorted(SOURCES)])}")
    # names do not tell CAD's dense networks from VainF's, nor timm's plain ResNets from torchvision's
    twins = {"cad": vainf, "timm": torchvision}
    if SOURCES[source].detect(tensors) or (source in twins and twins[source].detect(tensors)):
        return source
    raise CheckpointError(f"its tensors are not named like {source}'s but like {find_source(tensors)}'s")


def check_expected(plan: Plan, arch: str | None, num_classes: int | None) -> None:
    """Raises a CheckpointError for another network or count of classes than the caller expects."""
    if arch is not None and arch != plan.arch:
        raise CheckpointError(f"it holds a {plan.arch}, not a {arch}")
    found = plan.config.get("num_classes")
    if num_classes is not None and found != num_classes:
        raise CheckpointError(f"it has {found or 'no'} classes, not {num_classes}")


def check_head(plan: Plan, named: Named, is_optional: bool) -> None:
    """Raises a CheckpointError for a backbone alone, unless that is asked for and all that the file holds."""
    if plan.has_head:
        return
    if named.outside:
        raise unknown([*named.outside, *named.tensors])
    if not is_optional:
        raise CheckpointError(
            f"it is the classifier {plan.arch} and has no segmentation head; to convert its backbone "
            "alone add --allow-missing head"
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
