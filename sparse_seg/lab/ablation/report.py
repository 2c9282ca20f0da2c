"""An ablation's rows, of several seeds each, and what shows them: Markdown, CSV, and an HTML report."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sparse_seg.checkpoint import load_model
from sparse_seg.data import open_split
from sparse_seg.files import atomic_write
from sparse_seg.lab.ablation.costs import cost_key
from sparse_seg.lab.ablation.grid import Cell, Run
from sparse_seg.lab.ablation.runner import Ablation
from sparse_seg.lab.frames import Contender, explore
from sparse_seg.lab.report.html import Explorer, Picture, Section, write_report
from sparse_seg.lab.report.plots import COSTS, cost_curve
from sparse_seg.lab.report.tables import COLUMNS, Column, Table, table
from sparse_seg.run.way import Way

Rows = Sequence[dict[str, Any]]
MEASURED = ("parameters", "checkpoint_mb", "gmacs", "milliseconds", "peak_mib")
SHOWN = (
    *("network", "run", "exchange", "distillation_mark", "boundary_mark"),
    *("miou", "miou_std", "boundary_miou"),
    *("parameters_m", "checkpoint_mb", "gmacs", "milliseconds", "peak_mib", "step_seconds"),
    *("parameters_share", "gmacs_share", "milliseconds_share"),
)
FILES = (
    *("report.html", "table.md", "classes.md", "seeds.md", "table.csv"),
    *(f"pareto_{key}.png" for key in COSTS),
)
_MARK = {True: "x", False: ""}
_WAY = [COLUMNS[key] for key in ("network", "run", "exchange")]


def summarise(
    ablation: Ablation, results: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for each network and way to run it; the first is the baseline, to which the ratios refer.

    Args:
        results: of `ablation.grid.cells`, in their order.
        measured: see `measure_costs`.

    Returns:
        Rows of plain values. Accuracy in percent: means over the seeds, `miou_std` the sample's standard
        deviation (None of one seed), `miou_change` against the baseline. `*_share`: percent of its.
    """
    count = len(ablation.grid.spec.seeds)
    rows = [
        _row(ablation, *run, [result["metrics"] for result in results[count * number :][:count]], measured)
        for number, run in enumerate(ablation.grid.runs)
    ]
    for row in rows:
        row["miou_change"] = row["miou"] - rows[0]["miou"]
        row |= {f"{name}_share": 100 * row[name] / rows[0][name] for name in MEASURED}
    return rows


def _row(
    ablation: Ablation,
    name: str,
    run: Run,
    metrics: Sequence[Mapping[str, Any]],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    mious, seeds = [100 * one["miou"] for one in metrics], ablation.grid.spec.seeds
    train, network = ablation.grid.configs[name].train, ablation.grid.networks[name]
    loss, key = train.loss, cost_key(ablation, Cell(name, seeds[0], run))
    return {
        "network": name,
        "run": run.name,
        "dense": run.is_dense,
        "policy": run.mask,
        "exchange": run.exchange,
        "distillation": network.teacher is not None or train.distill.teacher is not None,
        "boundary": loss.reads_coarse_logits or max(loss.boundary_weight, loss.fine_weight) > 0,
        "seeds": seeds,
        "mious": mious,
        "miou": statistics.fmean(mious),
        "miou_std": statistics.stdev(mious) if len(mious) > 1 else None,
        "boundary_miou": 100 * statistics.fmean(one["boundary_miou"] for one in metrics),
        "class_iou": [
            statistics.fmean([100 * value for value in values if value is not None] or [math.nan])
            for values in zip(*(one["class_iou"] for one in metrics), strict=True)
        ],
        "step_seconds": measured["steps"].get(name),
        **{one: measured["costs"][key][one] for one in MEASURED},
    }


def ablation_table(rows: Rows, keys: Sequence[str] = SHOWN) -> Table:
    """The letter's form: method, switches, accuracy, cost, and cost as percent of the first row's.

    Args:
        keys: the columns to show, of `SHOWN`.
    """
    marks = ("distillation", "boundary")
    marked = [
        row | {f"{name}_mark": _MARK[row[name]] for name in marks} | {"parameters_m": row["parameters"] / 1e6}
        for row in rows
    ]
    return table(marked, [key for key in SHOWN if key in keys])


def seed_table(rows: Rows) -> Table:
    """mIoU by seed, to compare networks pair by pair: seeds often differ more than networks do."""
    seeds = [Column(f"seed {seed}", f"seed {seed}", "{:.2f}") for seed in rows[0]["seeds"]]
    lines = [row | {seed.key: miou for seed, miou in zip(seeds, row["mious"], strict=True)} for row in rows]
    return Table([*_WAY, *seeds, Column("miou", "mean", "{:.2f}")], lines)


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
    whole, seeds = ablation_table(rows), seed_table(rows)
    classes = class_table(rows, dataset.classes.names)
    plots = {key: _pareto(rows, key, label) for key, label in COSTS.items()}
    contents: list[str | bytes] = [f"{one.to_markdown()}\n" for one in (whole, classes, seeds)]
    for name, content in zip(FILES[1:], [*contents, whole.to_csv(), *plots.values()], strict=True):
        atomic_write(work_dir / name, content)
    text = (
        f"{spec.description}\n\nSeeds: {', '.join(map(str, spec.seeds))}. ± is the standard deviation over "
        "them. The last three columns are percent of the first row's. ms (in one run, taking turns) and peak "
        "memory are those of model.for_inference(), mask and argmax included. distil: trained with a "
        "teacher; detail: trained with a stress on boundaries, fine blocks and the coarse lattice; s/step: "
        "seconds of a training step, the teacher's forward pass included."
    )
    curves = [Picture(content, f"mIoU against {COSTS[key].split()[0]}") for key, content in plots.items()]
    explorer, links = _explorer(ablation, rows)
    parts: list[Section | Explorer] = [
        Section("Accuracy and cost", text, whole, links),
        Section("mIoU by seed", table=seeds),
        Section("Quality against cost", pictures=curves),
        Section("IoU by class: the first row, and the others' difference from it", table=classes),
        *([explorer] if explorer else []),
    ]
    write_report(work_dir / "report.html", spec.title, parts)


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
    seed = ablation.grid.spec.seeds[0]
    cells = [Cell(name, seed, run) for name, run in ablation.grid.runs]  # one a row
    selective = [number for number, row in enumerate(rows) if not row["dense"]]
    if not selective:
        return None, {}
    best = max(selective, key=lambda number: rows[number]["miou"])

    def rule(number: int) -> tuple[str, Run]:
        return cells[number].network, replace(cells[number].run, fine_fraction=None)

    same = [number for number in selective if rule(number) == rule(best)]
    same.sort(key=lambda number: cells[number].run.fine_fraction or 0.0)
    dense = {
        cell.run.output_stride: number
        for number, cell in enumerate(cells)
        if cell.run.output_stride and cell.network == cells[best].network
    }
    shown = [*([dense[max(dense)]] if len(dense) > 1 else []), *same, 0]
    links = {number: f"#step-{step}" for step, number in enumerate(shown)}
    cases = [_case(ablation, cells[number], rows[number]) for number in shown]
    dataset = open_split(cases[0].data, "val")
    limit = ablation.grid.spec.eval_images
    return explore(cases, shown.index(best), dataset, limit, f"Weights of seed {seed}."), links


def _case(ablation: Ablation, cell: Cell, row: dict[str, Any]) -> Contender:
    config = ablation.cell_config(cell)
    model = load_model(ablation.checkpoint(cell.network, cell.seed), config).to(ablation.device).eval()
    return Contender(f"{cell.network}, {cell.run.name}", row, model, Way(cell.run.output_stride), config.data)
