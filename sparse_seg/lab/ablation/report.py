"""An ablation as Markdown, CSV, and a self-contained HTML report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sparse_seg.checkpoint import load_model
from sparse_seg.data import open_split
from sparse_seg.files import atomic_write
from sparse_seg.lab.ablation.grid import Cell
from sparse_seg.lab.ablation.runner import Ablation
from sparse_seg.lab.frames import Case, explore
from sparse_seg.lab.report.explorer import SCRIPT, STYLE, Explorer
from sparse_seg.lab.report.html import Part, Section, plot, write_report
from sparse_seg.lab.report.plots import cost_curve
from sparse_seg.lab.report.tables import Column, Table
from sparse_seg.run.way import Way

Rows = Sequence[dict[str, Any]]
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
    dataset = open_split(config.data, "val")
    table, seeds = ablation_table(rows), seed_table(rows)
    classes = class_table(rows, dataset.classes.names)
    plots = {key: _pareto(rows, key, label) for key, label in PLOTS.items()}
    contents: list[str | bytes] = [f"{one.to_markdown()}\n" for one in (table, classes, seeds)]
    for name, content in zip(FILES[1:], [*contents, table.to_csv(), *plots.values()], strict=True):
        atomic_write(work_dir / name, content)
    text = (
        f"{spec.description}\n\nSeeds: {', '.join(map(str, spec.seeds))}. ± is the standard deviation over "
        "them. The last three columns are percent of the first row's. ms (in one run, taking turns) and peak "
        "memory are those of model.for_inference(), mask and argmax included. distil: trained with a "
        "teacher; detail: trained with a stress on boundaries, fine blocks and the coarse lattice; s/step: "
        "seconds of a training step, the teacher's forward pass included."
    )
    curves = [plot(plots["gmacs"], "mIoU against GMACs"), plot(plots["milliseconds"], "mIoU against ms")]
    explorer, links = _explorer(ablation, rows)
    sections: list[Part] = [
        Section("Accuracy and cost", text, table, links),
        Section("mIoU by seed", table=seeds),
        Section("Quality against cost", pictures=curves, pictures_per_row=2),
        Section("IoU by class: the first row, and the others' difference from it", table=classes),
        *([explorer] if explorer else []),
    ]
    write_report(work_dir / "report.html", spec.title, sections, STYLE, SCRIPT)


PLOTS = {"gmacs": "GMACs per image", "milliseconds": "ms per image"}
FILES = (
    *("report.html", "table.md", "classes.md", "seeds.md", "table.csv"),
    *(f"pareto_{key}.png" for key in PLOTS),
)


def _pareto(rows: Rows, key: str, label: str) -> bytes:
    """A line per network, through its runs that no other of its own beats; the baseline as reference, and
    the chord between its dense runs."""
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
    own = [row for row in rows if row["network"] == rows[0]["network"] and row["dense"]]
    chord = [(row[key], row["miou"]) for row in own] if len(own) > 1 else []
    return cost_curve(series, label, "mIoU %", first, chord=chord)


def _explorer(ablation: Ablation, rows: Rows) -> tuple[Explorer | None, dict[int, str]]:
    """The best selective row's network and mask at each fine fraction between its dense runs, by the first
    seed, on the frames where the baseline differs most; and links to it, by row."""
    selective = [row for row in rows if not row["dense"]]
    if not selective:
        return None, {}
    best = max(selective, key=lambda row: row["miou"])
    seed = ablation.grid.spec.seeds[0]
    cells = {(c.network, c.run.name, c.run.exchange): c for c in ablation.grid.cells if c.seed == seed}
    own = cells[_key(best)]
    dense, steps = [], []
    for number, row in enumerate(rows):
        cell = cells[_key(row)]
        if cell.network != own.network:
            continue
        if row["dense"]:
            dense.append((number, cell))
        elif replace(cell.run, fraction=None) == replace(own.run, fraction=None):
            steps.append((number, cell))
    coarse = max(dense, key=lambda entry: entry[1].run.output_stride or 0, default=None)
    steps.sort(key=lambda entry: entry[1].run.fraction or 0.0)
    shown = [*([coarse] if coarse and len(dense) > 1 else []), *steps, (0, next(iter(cells.values())))]
    links = {number: f"#step-{step}" for step, (number, _) in enumerate(shown)}
    cases = [_case(ablation, cell, rows[number]) for number, cell in shown]
    chosen = next(step for step, (_, cell) in enumerate(shown) if cell is own)
    dataset = open_split(cases[0].data, "val")
    count = min(len(dataset), ablation.grid.spec.eval_images or len(dataset))
    return explore(cases, chosen, dataset, count, f"Weights of seed {seed}."), links


def _key(row: dict[str, Any]) -> tuple[str, str, str | None]:
    return row["network"], row["run"], row["exchange"]


def _case(ablation: Ablation, cell: Cell, row: dict[str, Any]) -> Case:
    config = ablation.cell_config(cell)
    model = load_model(ablation.checkpoint(cell.network, cell.seed), config).to(ablation.device).eval()
    return Case(f"{cell.network}, {cell.run.name}", row, model, Way(cell.run.output_stride), config.data)
