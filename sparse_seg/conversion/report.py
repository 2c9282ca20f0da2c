"""What a conversion did, in words."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_seg.config import MaskConfig
from sparse_seg.conversion.forward import Conversion
from sparse_seg.conversion.mapping import Entry
from sparse_seg.conversion.module import ModuleConversion
from sparse_seg.errors import printable


def report(conversion: Conversion) -> str:
    """Lines for the terminal: every tensor of the source is mapped, set aside for a reason, or a twin."""
    plan, named, config = conversion.plan, conversion.named, conversion.config
    parameters = sum(tensor.numel() for tensor in named.tensors.values())
    head = (
        f"head {config.head}, {config.num_classes} classes, trained at output stride {config.trained_stride}"
    )
    lines = [
        (
            "source",
            f"{conversion.source} {plan.arch}, {len(named.tensors)} tensors, {parameters / 1e6:.2f} M values",
        ),
        *(("", note) for note in named.notes),
        ("network", f"{config.backbone} x{config.width:g}, {head if plan.has_head else 'no head'}"),
        ("mapped", f"{len(conversion.mapped.network)} tensors"),
        *(
            ("set aside", f"{len(entries)} tensors, {common_prefix(entries)}*: {reason}")
            for reason, entries in conversion.mapped.aside.items()
        ),
    ]
    if plan.aliases:
        lines.append(("twins", f"{len(plan.aliases)} tensors, the same values by another name"))
    lines.append(
        ("left over", "none; missing: none" + (" but the head, as allowed" if not plan.has_head else ""))
    )
    if conversion.mapped.counters:
        lines.append(
            ("", f"{conversion.mapped.counters} num_batches_tracked start at 0: the source has none")
        )
    lines.append(("input", str(conversion.scaling)))
    lines += [("classes", ", ".join(conversion.classes))] if conversion.classes else []
    lines += [("note", line) for line in plan.notes]
    return _table([*lines, *([_mask(config.mask)] if plan.has_head else [])])


def report_module(conversion: ModuleConversion) -> str:
    """Lines for the terminal: the network, where it runs, and what that saves."""
    network, report = conversion.network, conversion.network.report()
    dense, selective = report.total("dense"), report.total("selective")
    parts = [row.part for row in report.rows]
    counts = ", ".join(f"{parts.count(part)} {part}" for part in ("early", "rows", "late"))
    tensors = network.module.state_dict()
    values = sum(tensor.numel() for tensor in tensors.values())
    lines = [
        ("module", f"{network.settings.module}, {len(tensors)} tensors, {values / 1e6:.2f} M values"),
        (
            "network",
            f"{network.num_classes} classes, trained at output stride {network.geometry.own}, strides "
            f"{list(network.strides)}, convolutions: {counts}",
        ),
        (
            "cost",
            f"{selective / 1e9:.2f} GMACs, {selective / dense:.2f} of dense OS{network.strides[0]}'s, at "
            f"{report.size[0]}x{report.size[1]} and a share of {report.fraction:g} fine",
        ),
        ("", report.limit),
        ("input", str(conversion.scaling)),
    ]
    told = conversion.told
    lines += [] if told is None else [("classes", ", ".join(told.classes.names))]
    return _table([*lines, _mask(network.mask)])


def _mask(mask: MaskConfig) -> tuple[str, str]:
    """How the network chooses fine blocks when nothing else is said."""
    cut = (
        f"fine fraction {mask.fine_fraction:g}" if mask.threshold is None else f"threshold {mask.threshold:g}"
    )
    return "mask", f"policy {mask.policy}, {cut}; docs/masks.md tells how to choose them"


def _table(lines: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{title:<10}{printable(text)}" for title, text in lines)


def assumed_line(assumed: Sequence[str]) -> str:
    """What the source's tensors cannot tell, which no check of the converted file can find wrong."""
    return printable(f"{'assumed':<10}{'; '.join(assumed)}")


def common_prefix(entries: Sequence[Entry]) -> str:
    """The modules that the source's names begin with."""
    parts = [entry.theirs.split(".") for entry in entries]
    shared = [names[0] for names in zip(*parts, strict=False) if len(set(names)) == 1]
    return ".".join([*shared, ""])
