"""What a conversion did, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sparse_seg.checkpoint import Checkpoint
from sparse_seg.checkpoint.content import ASIDE
from sparse_seg.conversion.plan import Plan
from sparse_seg.errors import printable
from sparse_seg.run.network import SelectiveNetwork

Lines = list[tuple[str, str]]


def report_source(
    checkpoint: Checkpoint, plan: Plan, tensors: Mapping[str, Tensor], notes: Sequence[str]
) -> str:
    """Lines for the terminal: every tensor of the source is mapped, set aside for a reason, or a twin."""
    config, origin, entries = checkpoint.config, checkpoint.origin, checkpoint.origin.back["entries"]
    aside = [entry.theirs for entry in entries if entry.ours.startswith(ASIDE)]
    counters = checkpoint.weights.keys() - {entry.ours for entry in entries} - plan.fresh.keys()
    head, missing = "no head", " but the head, as allowed"
    if plan.has_head:
        stride, missing = config.trained_stride, ""
        head = f"head {config.head}, {config.num_classes} classes, trained at output stride {stride}"
    lines = [
        ("source", f"{origin.source} {plan.arch}, {_size(tensors)}"),
        *(("", note) for note in notes),
        ("network", f"{config.backbone} x{config.width:g}, {head}"),
        ("mapped", f"{len(entries) - len(aside)} tensors"),
    ]
    for reason in dict.fromkeys(map(plan.reason, aside)):
        names = [name for name in aside if plan.reason(name) == reason]
        lines.append(("set aside", f"{len(names)} tensors, {_common_prefix(names)}*: {reason}"))
    if plan.aliases:
        lines.append(("twins", f"{len(plan.aliases)} tensors, the same values by another name"))
    lines.append(("left over", f"none; missing: none{missing}"))
    if counters:
        lines.append(("", f"{len(counters)} num_batches_tracked start at 0: the source has none"))
    lines += [*_known(checkpoint), *(("note", line) for line in plan.notes)]
    return _table(lines + (_mask(checkpoint) if plan.has_head else []))


def report_module(checkpoint: Checkpoint, network: SelectiveNetwork, notes: Sequence[str]) -> str:
    """Lines for the terminal: the network, where it runs, and what that saves."""
    report, (height, width) = network.report(), network.report().size
    dense, selective = report.total("dense"), report.total("selective")
    parts = [row.part for row in report.rows]
    counts = ", ".join(f"{parts.count(part)} {part}" for part in ("early", "rows", "late"))
    lines = [
        ("module", f"{checkpoint.config.module}, {_size(network.module.state_dict())}"),
        *(("", note) for note in notes),
        (
            "network",
            f"{network.num_classes} classes, trained at output stride {network.geometry.own}, strides "
            f"{list(network.strides)}, convolutions: {counts}",
        ),
        (
            "cost",
            f"{selective / 1e9:.2f} GMACs, {selective / dense:.2f} of dense OS{network.strides[0]}'s, at "
            f"{height}x{width} and a share of {report.fraction:g} fine",
        ),
        ("", report.limit),
    ]
    return _table(lines + _known(checkpoint) + _mask(checkpoint))


def _size(tensors: Mapping[str, Tensor]) -> str:
    return f"{len(tensors)} tensors, {sum(one.numel() for one in tensors.values()) / 1e6:.2f} M values"


def _known(checkpoint: Checkpoint) -> Lines:
    """Scaling of the input, and the classes."""
    mean, std = ([round(value, 6) for value in values] for values in (checkpoint.mean, checkpoint.std))
    known = checkpoint.origin.normalisation or "ImageNet, assumed"
    classes = [("classes", ", ".join(checkpoint.classes))] if checkpoint.classes else []
    return [("input", f"RGB in 0..1, mean {mean}, std {std} ({known})"), *classes]


def _mask(checkpoint: Checkpoint) -> Lines:
    """How the network chooses fine blocks when nothing else is said."""
    mask = checkpoint.config.mask
    cut = (
        f"fine fraction {mask.fine_fraction:g}" if mask.threshold is None else f"threshold {mask.threshold:g}"
    )
    return [("mask", f"policy {mask.policy}, {cut}; docs/masks.md tells how to choose them")]


def _table(lines: Lines) -> str:
    return "\n".join(f"{title:<10}{printable(text)}" for title, text in lines)


def _common_prefix(names: Sequence[str]) -> str:
    """The modules that all names begin with."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    return ".".join([*(one[0] for one in parts if len(set(one)) == 1), ""])
