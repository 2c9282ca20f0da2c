"""A comparison as a table and as a self-contained HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_seg.data.dataset import SegmentationDataset
from sparse_seg.data.transforms import normalise
from sparse_seg.evaluation.comparison import Setting
from sparse_seg.evaluation.evaluate import predict
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.reporting.html import Section, photo, plot, write_report
from sparse_seg.reporting.overlays import colourise, draw_blocks, overlay, side_by_side
from sparse_seg.reporting.plots import cost_curve
from sparse_seg.reporting.tables import Column, Table
from sparse_seg.schema import DataConfig

Rows = Sequence[dict[str, Any]]


def comparison_table(rows: Rows) -> Table:
    """Accuracy and cost, one line per setting."""
    columns = [
        Column("network", "network"),
        Column("miou", "mIoU %", "{:.2f}"),
        Column("boundary_miou", "boundary mIoU %", "{:.2f}"),
        Column("gmacs", "GMACs", "{:.2f}"),
        Column("milliseconds", "ms", "{:.1f}"),
    ]
    return Table(columns, list(rows))


def write_comparison(
    path: str | Path,
    title: str,
    description: str,
    rows: Rows,
    model: SelectiveSegmentor,
    dataset: SegmentationDataset,
    data: DataConfig,
    shown: Sequence[Setting],
    images: int = 4,
) -> None:
    """Write the report: table, curves of quality against cost, some images run by the `shown` settings."""
    indices = np.linspace(0, len(dataset) - 1, min(images, len(dataset))).round().astype(int)
    pictures = [
        photo(_strip(model, dataset, data, int(index), shown), dataset.name(int(index))) for index in indices
    ]
    curves = [
        plot(_curve(rows, "miou", "mIoU %"), "mIoU against multiply-adds"),
        plot(
            _curve(rows, "boundary_miou", "boundary mIoU %"),
            "boundary mIoU (3 px trimap) against multiply-adds",
        ),
    ]
    sections = [
        Section("Accuracy and cost", description, comparison_table(rows)),
        Section("Quality against cost", pictures=curves, pictures_per_row=2),
        Section("Images", "Fine blocks are bright, coarse ones dark.", pictures=pictures, pictures_per_row=1),
    ]
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
def _strip(
    model: SelectiveSegmentor,
    dataset: SegmentationDataset,
    data: DataConfig,
    index: int,
    shown: Sequence[Setting],
) -> np.ndarray:
    """Input, label, then each setting's prediction, with its fine blocks where it is selective."""
    image, label = dataset.load(index)
    palette = dataset.classes.palette
    device = next(model.parameters()).device
    batch = normalise(image, data.mean, data.std)[None].to(device)
    target = torch.from_numpy(label.astype(np.int64))[None].to(device)
    pictures, titles = [image, colourise(label, palette)], ["input", "label"]
    for setting in shown:
        classes, fine_blocks = predict(model, batch, setting.output_stride, setting.policy, target)
        if fine_blocks is not None:
            pictures.append(draw_blocks(image, fine_blocks[0].cpu().numpy()))
            titles.append(f"blocks: {setting.name}")
        pictures.append(overlay(image, classes[0].cpu().numpy(), palette))
        titles.append(setting.name)
    return side_by_side(pictures, titles)
