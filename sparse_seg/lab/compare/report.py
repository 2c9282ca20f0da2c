"""A comparison as a table and as a self-contained HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_seg.config import DataConfig
from sparse_seg.data.dataset import Image, SegmentationDataset
from sparse_seg.data.transforms import normalise
from sparse_seg.lab.report.html import Section, photo, plot, write_report
from sparse_seg.lab.report.overlays import colourise, contact_sheet, draw_levels, overlay, write_image
from sparse_seg.lab.report.plots import cost_curve
from sparse_seg.lab.report.tables import Column, Table
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.models.way import Way

Rows = Sequence[dict[str, Any]]


def comparison_table(rows: Rows) -> Table:
    """Accuracy and cost, one line per way."""
    columns = [
        Column("network", "network"),
        Column("miou", "mIoU %", "{:.2f}"),
        Column("boundary_miou", "boundary mIoU %", "{:.2f}"),
        Column("gmacs", "GMACs", "{:.2f}"),
        Column("milliseconds", "ms", "{:.1f}"),
    ]
    return Table(columns, list(rows))


def fraction_table(rows: Rows, key: str, exchange: str | None = None) -> Table:
    """One value of the selective rows: a line per policy, a column per fine fraction, under one rule."""
    own = [row for row in rows if row["policy"] and row["exchange"] == exchange]
    lines: dict[str, dict[str, Any]] = {}
    for row in own:
        lines.setdefault(row["policy"], {"policy": row["policy"]})[f"{row['fine_fraction']:g}"] = row[key]
    fractions = sorted({row["fine_fraction"] for row in own})
    columns = [Column(f"{fraction:g}", f"f={fraction:g}", "{:.2f}") for fraction in fractions]
    return Table([Column("policy", "policy"), *columns], list(lines.values()))


def write_comparison(
    path: str | Path,
    title: str,
    description: str,
    rows: Rows,
    model: SelectiveSegmentor,
    dataset: SegmentationDataset,
    data: DataConfig,
    shown: Sequence[Way],
    images: int = 4,
) -> None:
    """Write the report: table, curves of quality against cost, some images run in the `shown` ways.

    The first image's pictures also go together into a PNG file of the same name.
    """
    curves = [
        plot(_curve(rows, "miou", "mIoU %"), "mIoU against multiply-adds"),
        plot(_curve(rows, "boundary_miou", "boundary mIoU %"), "boundary mIoU (3 px) against multiply-adds"),
    ]
    sections = [
        Section("Accuracy and cost", description, comparison_table(rows)),
        Section("Quality against cost", pictures=curves, pictures_per_row=2),
    ]
    for index in np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int):
        named = runs_on_image(model, dataset, data, index, shown)
        sections.append(Section(dataset.name(index), pictures=[photo(image, name) for name, image in named]))
        if index == 0:
            rows_of_three = [named[start : start + 3] for start in range(0, len(named), 3)]
            write_image(Path(path).with_suffix(".png"), contact_sheet(rows_of_three))
    write_report(path, title, sections)


def _curve(rows: Rows, key: str, label: str) -> bytes:
    series: dict[str, list[tuple[float, float]]] = {}
    references = {}
    for row in rows:
        point = (row["gmacs"], row[key])
        if row["policy"] is None:
            references[row["network"]] = point
        else:
            series.setdefault(row["policy"], []).append(point)
    return cost_curve(series, "GMACs per image", label, references)


@torch.inference_mode()
def runs_on_image(
    model: SelectiveSegmentor,
    dataset: SegmentationDataset,
    data: DataConfig,
    index: int,
    shown: Sequence[Way],
) -> list[tuple[str, Image]]:
    """Named pictures: input, label, then each way's prediction and, if selective, its fine blocks."""
    image, label = dataset.load(index)
    palette = dataset.classes.palette
    device = next(model.parameters()).device
    batch = normalise(image, data.mean, data.std)[None].to(device)
    target = torch.from_numpy(label.astype(np.int64))[None].to(device)
    pictures = [("input", image), ("label", colourise(label, palette))]
    for way in shown:
        run = model.start(batch, target).follow(way)
        if run.mask is not None:
            levels = run.levels[0].cpu().numpy()
            pictures.append((f"stride by block: {way.name}", draw_levels(image, levels, model.strides)))
        pictures.append((way.name, overlay(image, run.classes()[0].cpu().numpy(), palette)))
    return pictures
