"""A comparison as a table and as a self-contained HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_seg.config import DataConfig
from sparse_seg.data.dataset import Image, SegmentationDataset
from sparse_seg.lab.frames import Case, explore
from sparse_seg.lab.opened import Opened
from sparse_seg.lab.report.html import Part, Picture, Section, plot, write_report
from sparse_seg.lab.report.overlays import colourise, contact_sheet, draw_levels, overlay, write_image
from sparse_seg.lab.report.plots import COSTS, cost_curve
from sparse_seg.lab.report.tables import COLUMNS, Column, Table, table
from sparse_seg.run.segmentor import Segmentor
from sparse_seg.run.way import Way

Rows = Sequence[dict[str, Any]]


def comparison_table(rows: Rows) -> Table:
    """Accuracy and cost, one line per way."""
    return table(rows, ("network", "miou", "boundary_miou", "gmacs", "milliseconds"))


def fraction_table(rows: Rows, key: str, exchange: str | None = None) -> Table:
    """One value of the selective rows: a line per policy, a column per fine fraction, under one rule."""
    own = [row for row in rows if row["policy"] and row["exchange"] == exchange]
    lines: dict[str, dict[str, Any]] = {}
    for row in own:
        lines.setdefault(row["policy"], {"policy": row["policy"]})[f"{row['fine_fraction']:g}"] = row[key]
    fractions = sorted({row["fine_fraction"] for row in own})
    columns = [Column(f"{fraction:g}", f"f={fraction:g}", "{:.2f}") for fraction in fractions]
    return Table([COLUMNS["policy"], *columns], list(lines.values()))


def write_comparison(
    path: str | Path,
    title: str,
    description: str,
    rows: Rows,
    opened: Opened,
    ways: Sequence[Way],
) -> None:
    """Write the report: table, curves of quality against cost, frames run dense and under the first policy.

    The first frame's pictures also go together into a PNG file of the same name.

    Args:
        ways: those of the rows, as `comparison_ways` gives them.
    """
    model, dataset, data = opened.model, opened.dataset, opened.config.data
    dense = [way for way in ways if way.is_dense]
    first = ways[len(dense)]
    rules = first.mask, first.exchange, first.merge
    selective = [way for way in ways if (way.mask, way.exchange, way.merge) == rules]
    steps = [dense[-1], *sorted(selective, key=lambda way: way.fine_fraction or 0.0), dense[0]]
    by_name = {row["network"]: row for row in rows}
    cases = [Case(way.name, by_name[way.name], model, way, data) for way in steps]
    chosen = len(steps) // 2
    links = {number: f"#step-{steps.index(way)}" for number, way in enumerate(ways) if way in steps}
    names = [row["network"] for row in rows]
    sections: list[Part] = [
        Section(
            "Accuracy and cost",
            description,
            comparison_table(rows),
            {names.index(ways[number].name): link for number, link in links.items()},
        ),
        Section("Quality against cost", CHORD, pictures=_curves(rows, dense), pictures_per_row=2),
        explore(cases, chosen, dataset, min(len(dataset), opened.limit or len(dataset))),
    ]
    named = runs_on_image(model, dataset, data, 0, [*dense, steps[chosen]])
    rows_of_three = [named[start : start + 3] for start in range(0, len(named), 3)]
    write_image(Path(path).with_suffix(".png"), contact_sheet(rows_of_three))
    write_report(path, title, sections)


CHORD = (
    "Dotted: the chord between the dense networks, which a mixture of both reaches. Only what lies above it "
    "is worth its cost."
)
_QUALITIES = {"miou": "mIoU %", "boundary_miou": "boundary mIoU %"}


def _curves(rows: Rows, dense: Sequence[Way]) -> list[Picture]:
    """Each quality against each cost that was measured."""
    pictures = []
    for key, label in _QUALITIES.items():
        for cost, unit in COSTS.items():
            if any(row[cost] is None for row in rows):
                continue
            series: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                if row["policy"] is not None:
                    rules = filter(None, (row["policy"], row["exchange"], row.get("merge")))
                    series.setdefault(", ".join(rules), []).append((row[cost], row[key]))
            points = {row["network"]: (row[cost], row[key]) for row in rows if row["policy"] is None}
            chord = [points[way.name] for way in (dense[-1], dense[0])]
            content = cost_curve(series, unit, label, points, chord=chord)
            pictures.append(plot(content, f"{label.removesuffix(' %')} against {unit.split()[0]}"))
    return pictures


def runs_on_image(
    model: Segmentor,
    dataset: SegmentationDataset,
    data: DataConfig,
    index: int,
    shown: Sequence[Way],
) -> list[tuple[str, Image]]:
    """Named pictures: input, label, then each way's prediction and, if selective, its fine blocks."""
    image, label = dataset.load(index)
    palette = dataset.classes.palette
    pictures = [("input", image), ("label", colourise(label, palette))]
    for way in shown:
        classes, levels = Case(way.name, {}, model, way, data).classes(image, label)
        if levels is not None:
            pictures.append((f"stride by block: {way.name}", draw_levels(image, levels, model.strides)))
        pictures.append((way.name, overlay(image, classes, palette)))
    return pictures
