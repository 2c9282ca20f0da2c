"""A comparison's files, whose rows can be resumed, and what shows them: a table and an HTML report."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_seg.checkpoint import network_settings
from sparse_seg.data.dataset import Image, SegmentationDataset
from sparse_seg.errors import ConfigError
from sparse_seg.export.runner import AUTO, TORCH
from sparse_seg.lab.compare.run import compare, comparison_runtime, groups
from sparse_seg.lab.frames import Contender, explore
from sparse_seg.lab.opened import Opened
from sparse_seg.lab.provenance import provenance, write_result
from sparse_seg.lab.report.html import Explorer, Picture, Section, write_report
from sparse_seg.lab.report.overlays import colourise, contact_sheet, draw_levels, overlay, write_image
from sparse_seg.lab.report.plots import COSTS, cost_curve
from sparse_seg.lab.report.tables import Table, table
from sparse_seg.masks.build import CUTS
from sparse_seg.run.way import Way

Rows = Sequence[dict[str, Any]]
_ROWS_OWN = ("policy", *CUTS)  # of a mask: each row says its own


def written(json_path: str | Path | None, report_path: str | Path | None = None) -> list[Path]:
    """The files asked for; a report has a picture beside it."""
    pages = [Path(report_path), Path(report_path).with_suffix(".png")] if report_path else []
    return [Path(json_path), *pages] if json_path else pages


def compare_and_report(
    opened: Opened,
    ways: Sequence[Way],
    json_path: str | Path | None = None,
    report_path: str | Path | None = None,
    resume: bool = False,
    timed: bool = True,
    runtime: str = AUTO,
) -> None:
    """Compare the ways to run a checkpoint, print the table, and write the files asked for.

    Args:
        ways: as `comparison_ways` gives them.
        resume: keep the rows of the JSON file, and measure the others policy by policy.
        timed: see `compare`.
        runtime: see `comparison_runtime`.

    Raises:
        ConfigError: the file to resume holds something else.
    """
    config, loaded, model, dataset, split, limit = opened
    fast, reason = comparison_runtime(model, dataset, config.data, ways, runtime)
    data, name = config.data, fast.runtime if fast else None
    origin, rows = provenance() | {"runtime": name or TORCH}, list[dict[str, Any]]()
    rules = {key: value for key, value in dataclasses.asdict(model.mask).items() if key not in _ROWS_OWN}
    subject: list[Any] = [data.dataset, str(Path(data.root).resolve()), split, limit, list(model.strides)]
    subject += [data.bits, name, data.train_on, data.withheld, rules, model.exchange, model.merge]
    digest = hashlib.blake2b(loaded.path.read_bytes() + json.dumps(subject).encode(), digest_size=16)
    origin["subject"] = digest.hexdigest()
    if resume:
        rows, commits = _earlier(json_path, origin["subject"])
        origin["commits"] = sorted({*commits, str(origin["commit"])})  # of all runs that measured
    known = {row["network"] for row in rows}
    for part in groups([way for way in ways if way.name not in known]) if resume else [ways]:
        rows += compare(model, dataset, config.data, part, limit, timed=timed, fast=fast)
        if json_path:
            write_result(json_path, origin | {"rows": rows})
    print(comparison_table(rows).to_text())
    print(f"runtime: {origin['runtime']}" + (f" ({reason})" if reason else ""))
    if report_path:
        own = network_settings(loaded, config)
        description = (
            f"{loaded.path}: {own.module or f'{own.backbone} x{own.width:g}, {own.head} head'}, on "
            f"{rows[0]['images']} images of {config.data.dataset} {split}. "
            "One set of weights, no retraining. "
            f"{origin['machine']}, threads: {origin['threads']}; milliseconds are medians over the images, "
            f"in {origin['runtime']}."
        )
        write_comparison(report_path, description, rows, opened, ways)
        print(f"report: {report_path}")


def _earlier(path: str | Path | None, subject: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of an earlier comparison and the commits they are of; none if there is no such file.

    Raises:
        ConfigError: the file holds something else, or rows of other weights, images, strides or runtime.
    """
    assert path is not None
    if not Path(path).exists():
        return [], []
    try:
        found = json.loads(Path(path).read_text())
        rows = [row for row in found["rows"] if row["network"]]
        commits, earlier = found.get("commits", [str(found["commit"])]), found.get("subject", subject)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} holds no comparison to resume; remove it or name another file") from None
    if earlier != subject:
        raise ConfigError(
            f"{path} holds rows of other weights, images, strides or rules, or of another runtime; name "
            "another --json file"
        )
    return rows, commits


def comparison_table(rows: Rows) -> Table:
    """Accuracy and cost, one line per way."""
    return table(rows, ("network", "miou", "boundary_miou", "gmacs", "milliseconds"))


def write_comparison(
    path: str | Path, description: str, rows: Rows, opened: Opened, ways: Sequence[Way]
) -> None:
    """Write the report: table, curves of quality against cost, frames run dense and under the first policy.

    The first frame's pictures also go together into a PNG file of the same name.

    Args:
        ways: those of the rows, in their order.
    """
    model, dataset, data = opened.model, opened.dataset, opened.config.data
    dense = [way for way in ways if way.is_dense]
    first = ways[len(dense)]
    rules = first.mask, first.exchange, first.merge
    selective = [way for way in ways if (way.mask, way.exchange, way.merge) == rules]
    steps = [dense[-1], *sorted(selective, key=lambda way: way.fine_fraction or 0.0), dense[0]]
    chosen, named = len(steps) // 2, {row["network"]: row for row in rows}
    cases = {way: Contender(way.name, named[way.name], model, way, data) for way in (*steps, *dense)}
    places = list(named)
    links = {places.index(way.name): f"#step-{number}" for number, way in enumerate(steps)}
    parts: list[Section | Explorer] = [
        Section("Accuracy and cost", description, comparison_table(rows), links),
        Section("Quality against cost", CHORD, pictures=_curves(rows, dense)),
        explore([cases[way] for way in steps], chosen, dataset, opened.limit),
    ]
    sheet = _sheet([cases[way] for way in (*dense, steps[chosen])], dataset)
    write_image(Path(path).with_suffix(".png"), sheet)
    write_report(path, "Dense and selective", parts)


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
            pictures.append(Picture(content, f"{label.removesuffix(' %')} against {unit.split()[0]}"))
    return pictures


def _sheet(cases: Sequence[Contender], dataset: SegmentationDataset) -> Image:
    """The first frame, three pictures a row: input, label, then each prediction and, if selective, its fine
    blocks."""
    image, label = dataset.load(0)
    palette = dataset.classes.palette
    pictures = [("input", image), ("label", colourise(label, palette))]
    for case in cases:
        classes, levels = case.classes(image, label)
        if levels is not None:
            pictures.append((f"stride by block: {case.name}", draw_levels(image, levels, case.model.strides)))
        pictures.append((case.name, overlay(image, classes, palette)))
    return contact_sheet([pictures[start : start + 3] for start in range(0, len(pictures), 3)])
