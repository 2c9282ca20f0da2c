"""What a conversion did, in words."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_seg.conversion.convert import Conversion
from sparse_seg.conversion.mapping import Entry


def report(conversion: Conversion) -> str:
    """Lines for the terminal: every tensor of the source is mapped, set aside for a reason, or a twin."""
    plan, file, config = conversion.plan, conversion.file, conversion.description.config
    parameters = sum(tensor.numel() for tensor in file.tensors.values())
    head = (
        f"head {config.head}, {config.num_classes} classes, trained at output stride {config.trained_stride}"
    )
    lines = [
        (
            "source",
            f"{conversion.source} {plan.arch}, {len(file.tensors)} tensors, {parameters / 1e6:.2f} M values",
        ),
        *(("", note) for note in file.notes),
        ("network", f"{config.backbone} x{config.width:g}, {head if plan.has_head else 'no head'}"),
        ("mapped", f"{len(conversion.mapped.network)} tensors"),
        *(
            ("set aside", f"{len(entries)} tensors, {common_prefix(entries)}*: {reason}")
            for reason, entries in conversion.mapped.aside.items()
        ),
    ]
    if conversion.mapped.aliases:
        lines.append(("twins", f"{len(conversion.mapped.aliases)} tensors, the same values by another name"))
    lines.append(
        ("left over", "none; missing: none" + (" but the head, as allowed" if not plan.has_head else ""))
    )
    if conversion.mapped.fresh:
        lines.append(
            ("", f"{len(conversion.mapped.fresh)} num_batches_tracked start at 0: the source has none")
        )
    classes = conversion.description.classes
    lines += [("classes", ", ".join(classes))] if classes else []
    lines += [("assumed", line) for line in plan.assumed]
    lines += [("note", line) for line in plan.notes]
    return "\n".join(f"{title:<10}{text}" for title, text in lines)


def common_prefix(entries: Sequence[Entry]) -> str:
    """The modules that the source's names begin with."""
    parts = [entry.theirs.split(".") for entry in entries]
    shared = [names[0] for names in zip(*parts, strict=False) if len(set(names)) == 1]
    return ".".join([*shared, ""])
