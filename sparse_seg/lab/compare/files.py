"""A comparison's files: rows that can be resumed, and the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_seg.checkpoint import network_settings
from sparse_seg.errors import ConfigError
from sparse_seg.export.runner import AUTO, TORCH
from sparse_seg.files import atomic_write
from sparse_seg.lab.compare.report import comparison_table, write_comparison
from sparse_seg.lab.compare.run import compare, comparison_runtime, comparison_ways, groups
from sparse_seg.lab.opened import Opened
from sparse_seg.lab.provenance import provenance


def written(json_path: str | Path | None, report_path: str | Path | None = None) -> list[Path]:
    """The files asked for; a report has a picture beside it."""
    pages = [Path(report_path), Path(report_path).with_suffix(".png")] if report_path else []
    return [Path(json_path), *pages] if json_path else pages


def compare_and_report(
    opened: Opened,
    policies: Sequence[str],
    fractions: Sequence[float],
    json_path: str | Path | None = None,
    report_path: str | Path | None = None,
    exchanges: Sequence[str] = (),
    merges: Sequence[str] = (),
    resume: bool = False,
    timed: bool = True,
    runtime: str = AUTO,
) -> None:
    """Compare the ways to run a checkpoint, print the table, and write the files asked for.

    Args:
        policies, fractions, exchanges, merges: see `comparison_ways`.
        resume: keep the rows of the JSON file, and measure the others policy by policy.
        timed: see `compare`.
        runtime: see `comparison_runtime`.

    Raises:
        ConfigError: the file to resume holds something else.
    """
    config, loaded, model, dataset, split, limit = opened
    ways = comparison_ways(model, policies, fractions, exchanges, merges)
    fast, reason = comparison_runtime(model, dataset, config.data, ways, runtime)
    origin, rows = provenance() | {"runtime": fast.runtime if fast else TORCH}, list[dict[str, Any]]()
    subject = [config.data.dataset, str(Path(config.data.root).resolve()), split, limit, list(model.strides)]
    subject += filter(None, [config.data.bits, fast.runtime if fast else None])
    digest = hashlib.blake2b(loaded.path.read_bytes() + json.dumps(subject).encode(), digest_size=16)
    origin["subject"] = digest.hexdigest()
    if resume:
        rows, commits = _earlier(json_path, origin["subject"])
        origin["commits"] = sorted({*commits, str(origin["commit"])})  # of all runs that measured
    known = {row["network"] for row in rows}
    for part in groups([way for way in ways if way.name not in known]) if resume else [ways]:
        rows += compare(model, dataset, config.data, part, limit, progress=True, timed=timed, fast=fast)
        if json_path:
            atomic_write(json_path, json.dumps(origin | {"rows": rows}, indent=1) + "\n")
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
        write_comparison(report_path, "Dense and selective", description, rows, opened, ways)
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
            f"{path} holds rows of other weights, images or strides, or of another runtime; name another "
            "--json file"
        )
    return rows, commits
