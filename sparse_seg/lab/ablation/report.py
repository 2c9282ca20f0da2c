"""An ablation as Markdown, CSV, and a self-contained HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sparse_seg.checkpoint import load_model
from sparse_seg.data import build_dataset
from sparse_seg.data.dataset import IGNORE_INDEX, Image
from sparse_seg.data.transforms import normalise
from sparse_seg.files import atomic_write
from sparse_seg.lab.ablation.grid import Cell
from sparse_seg.lab.ablation.runner import Ablation
from sparse_seg.lab.report.html import Section, photo, plot, write_report
from sparse_seg.lab.report.overlays import colourise, draw_levels, overlay
from sparse_seg.lab.report.plots import cost_curve
from sparse_seg.lab.report.tables import Column, Table
from sparse_seg.masks import block_levels

Rows = Sequence[dict[str, Any]]
SHOWN = 4  # frames in the report
_MARK = {True: "x", False: ""}
_WAY = (Column("network", "network"), Column("run", "run"), Column("exchange", "exchange"))


def ablation_table(rows: Rows, keys: Sequence[str] | None = None) -> Table:
    """The letter's form: method, switches, accuracy, cost, and cost as percent of the first row's.

    Args:
        keys: the columns to show; default: all.
    """
    columns = [
        *_WAY,
        Column("distillation_mark", "distil"),
        Column("boundary_mark", "detail"),
        Column("miou", "mIoU %", "{:.2f}"),
        Column("miou_std", "±", "{:.2f}"),
        Column("boundary_miou", "boundary mIoU %", "{:.2f}"),
        Column("parameters_m", "M params", "{:.2f}"),
        Column("checkpoint_mb", "MB", "{:.1f}"),
        Column("gmacs", "GMACs", "{:.2f}"),
        Column("milliseconds", "ms", "{:.1f}"),
        Column("peak_mib", "peak MiB", "{:.0f}"),
        Column("step_seconds", "s/step", "{:.2f}"),
        Column("parameters_share", "params %", "{:.0f}"),
        Column("gmacs_share", "GMACs %", "{:.0f}"),
        Column("milliseconds_share", "ms %", "{:.0f}"),
    ]
    marked = [
        row
        | {f"{name}_mark": _MARK[row[name]] for name in ("distillation", "boundary")}
        | {"parameters_m": row["parameters"] / 1e6}
        for row in rows
    ]
    return Table([column for column in columns if keys is None or column.key in keys], marked)


def seed_table(rows: Rows) -> Table:
    """mIoU by seed, to compare networks pair by pair: seeds often differ more than networks do."""
    seeds = rows[0]["seeds"]
    by_seed = [Column(f"seed {seed}", f"seed {seed}", "{:.2f}") for seed in seeds]
    columns = [*_WAY, *by_seed, Column("miou", "mean", "{:.2f}")]
    lines = [
        row | {f"seed {seed}": miou for seed, miou in zip(seeds, row["mious"], strict=True)} for row in rows
    ]
    return Table(columns, lines)


def class_table(rows: Rows, names: Sequence[str]) -> Table:
    """IoU by class of the first row, and the others' differences from it."""
    columns = [*_WAY, *(Column(name, name) for name in names)]
    lines = []
    for number, row in enumerate(rows):
        line = {column.key: row[column.key] for column in _WAY}
        for name, own, first in zip(names, row["class_iou"], rows[0]["class_iou"], strict=True):
            line[name] = f"{own:.1f}" if number == 0 else f"{own - first:+.1f}"
        lines.append(line)
    return Table(columns, lines)


def write_ablation(ablation: Ablation, rows: Rows) -> None:
    """Write tables (`table.md`, `table.csv`, `classes.md`, `seeds.md`), two plots and `report.html`.

    Raises:
        SparseSegError: matplotlib is missing.
    """
    work_dir, spec = ablation.work_dir, ablation.grid.spec
    config = next(iter(ablation.grid.configs.values()))
    dataset = build_dataset(config.data.dataset, config.data.root, "val")
    table, seeds = ablation_table(rows), seed_table(rows)
    classes = class_table(rows, dataset.classes.names)
    plots = {key: _pareto(rows, key, label) for key, label in PLOTS.items()}
    atomic_write(work_dir / "table.md", table.to_markdown() + "\n")
    atomic_write(work_dir / "table.csv", table.to_csv())
    atomic_write(work_dir / "classes.md", classes.to_markdown() + "\n")
    atomic_write(work_dir / "seeds.md", seeds.to_markdown() + "\n")
    for key, content in plots.items():
        atomic_write(work_dir / f"pareto_{key}.png", content)
    text = (
        f"{spec.description}\n\nSeeds: {', '.join(map(str, spec.seeds))}. ± is the standard deviation over "
        "them. The last three columns are percent of the first row's. ms (in one run, taking turns) and peak "
        "memory are those of model.for_inference(), mask and argmax included. distil: trained with a "
        "teacher; detail: trained with a stress on boundaries, fine blocks and the coarse lattice; s/step: "
        "seconds of a training step, the teacher's forward pass included."
    )
    curves = [plot(plots["gmacs"], "mIoU against GMACs"), plot(plots["milliseconds"], "mIoU against ms")]
    sections = [
        Section("Accuracy and cost", text, table),
        Section("mIoU by seed", table=seeds),
        Section("Quality against cost", pictures=curves, pictures_per_row=2),
        Section("IoU by class: the first row, and the others' difference from it", table=classes),
        *_frames(ablation, rows),
    ]
    write_report(work_dir / "report.html", spec.title, sections)


PLOTS = {"gmacs": "GMACs per image", "milliseconds": "ms per image"}


def _pareto(rows: Rows, key: str, label: str) -> bytes:
    """A line per network, through its runs that no other of its own beats; the baseline as reference."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows[1:]:
        series.setdefault(row["network"], []).append((row[key], row["miou"]))
    for name, points in series.items():
        series[name] = [
            (cost, miou)
            for cost, miou in points
            if not any(c <= cost and m >= miou and (c, m) != (cost, miou) for c, m in points)
        ]
    first = {f"{rows[0]['network']}, {rows[0]['run']}": (rows[0][key], rows[0]["miou"])}
    return cost_curve(series, label, "mIoU %", first)


def _frames(ablation: Ablation, rows: Rows) -> list[Section]:
    """The frames where the baseline and the best selective row differ most, by the first seed."""
    selective = [row for row in rows if not row["dense"]]
    if not selective:
        return []
    best = max(selective, key=lambda row: row["miou"])
    seed = ablation.grid.spec.seeds[0]
    cells = [cell for cell in ablation.grid.cells if cell.seed == seed]
    key = best["network"], best["run"], best["exchange"]
    pair = cells[0], next(c for c in cells if (c.network, c.run.name, c.run.exchange) == key)
    sections = [
        Section(
            "Where they differ most",
            f"The {SHOWN} validation frames in which {_name(pair[0])} and {_name(pair[1])} (the best "
            "selective row) disagree about most labelled pixels; those are white in the last picture where "
            "the baseline alone is right, orange where the selective network is, grey where neither is.",
        )
    ]
    for share, named in _most_different(ablation, pair):
        pictures = [photo(image, name) for name, image in named[1]]
        sections.append(Section(f"{named[0]}: {100 * share:.1f} % of the pixels", pictures=pictures))
    return sections


def _name(cell: Cell) -> str:
    return f"{cell.network}, {cell.run.name}"


@torch.inference_mode()
def _most_different(
    ablation: Ablation, pair: tuple[Cell, Cell]
) -> list[tuple[float, tuple[str, list[tuple[str, Image]]]]]:
    """(share of pixels, (frame, named pictures)), most different first."""
    configs = [ablation.cell_config(cell) for cell in pair]
    models = [
        load_model(ablation.checkpoint(cell.network, cell.seed), config).to(ablation.device)
        for cell, config in zip(pair, configs, strict=True)
    ]
    dataset = build_dataset(configs[0].data.dataset, configs[0].data.root, "val")
    palette = dataset.classes.palette
    count = min(len(dataset), ablation.grid.spec.eval_images or len(dataset))
    found: list[tuple[float, int, list[np.ndarray], np.ndarray | None]] = []
    for index in tqdm(range(count), desc="differences", leave=False):
        image, label = dataset.load(index)
        target = torch.from_numpy(label).long()[None].to(ablation.device)
        classes, blocks = [], None
        for cell, config, model in zip(pair, configs, models, strict=True):
            batch = normalise(image, config.data.mean, config.data.std)[None].to(ablation.device)
            predicted, blocks = model.classify(batch, cell.run.output_stride, labels=target)
            classes.append(predicted[0].cpu().numpy().astype(np.uint8))
        labelled = label != IGNORE_INDEX
        share = float((classes[0] != classes[1])[labelled].mean()) if labelled.any() else 0.0
        levels = None if blocks is None else block_levels(blocks, models[1].strides)[0].cpu().numpy()
        found = sorted([*found, (share, index, classes, levels)], key=lambda entry: -entry[0])[:SHOWN]
    results = []
    for share, index, (dense, selective), levels in found:
        image, label = dataset.load(index)
        pictures = [("input", image), ("label", colourise(label, palette))]
        if levels is not None:
            pictures.append(("stride by block", draw_levels(image, levels, models[1].strides)))
        pictures += [
            (_name(pair[0]), overlay(image, dense, palette)),
            (_name(pair[1]), overlay(image, selective, palette)),
            ("difference", _difference(image, label, dense, selective)),
        ]
        results.append((share, (dataset.name(index), pictures)))
    return results


def _difference(image: Image, label: np.ndarray, dense: np.ndarray, selective: np.ndarray) -> Image:
    """The image, darkened and blue, with the pixels on which both disagree in white, orange or grey."""
    picture = (image * np.array([0.25, 0.35, 0.6])).astype(np.uint8)
    differ = (dense != selective) & (label != IGNORE_INDEX)
    picture[differ] = 128
    picture[differ & (dense == label)] = 255
    picture[differ & (selective == label)] = (255, 140, 0)
    return picture
