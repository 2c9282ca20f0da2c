"""One network run in many ways on one picture: time, multiply-adds and memory against the plain dense one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from sparse_seg.errors import ConfigError, SparseSegError
from sparse_seg.evaluation.cost import Macs
from sparse_seg.evaluation.latency import Latency, Run, interleaved, peak_memory
from sparse_seg.evaluation.subject import Setup, Subject, Way, prepare_way, use_engine
from sparse_seg.sparse import SelectiveConv2d, SiteLayout


def ways(
    scope: str,
    fractions: Sequence[float],
    engines: Sequence[str],
    fast: bool,
    policies: Sequence[str] = (),
) -> list[Way]:
    """All rows of a scope, the baseline (plain dense OS8) first; `policies` beside the config's own."""
    rows = [Way(scope, "plain", 8)]
    if scope == "train":
        return rows + [Way(scope, "selective", 8, f, engine) for f in fractions for engine in engines]
    forms = (False, True) if fast else (False,)
    rows += [Way(scope, "plain", 16), *(Way(scope, "dense", 8, engine="gather", fast=form) for form in forms)]
    for fraction in fractions:
        rows += [Way(scope, "selective", 8, fraction, engine) for engine in engines]
        if fast:  # it has its own form of the gather engine
            rows.append(Way(scope, "selective", 8, fraction, "gather", fast=True))
        if scope == "network":  # the other scope starts behind the mask
            rows += [Way(scope, "selective", 8, fraction, "gather", fast, policy) for policy in policies]
    return rows


@torch.enable_grad()
def engine_fault(engine: str, device: torch.device, dtype: torch.dtype, train: bool) -> str | None:
    """Why an engine cannot run here, found by trying; None if it can."""
    if engine == "gather":
        return None
    conv = SelectiveConv2d(16, 16, 16).to(device, dtype).requires_grad_(train)
    use_engine(conv, engine)
    blocks = torch.eye(4, dtype=torch.bool, device=device)[None]
    layout = SiteLayout.from_fine_blocks(blocks, (8, 8))
    rows = torch.zeros(layout.num_sites, 16, device=device, dtype=dtype)
    try:
        conv(rows, layout, layout)
    except SparseSegError as error:
        return str(error)
    return None


def check_training(setup: Setup) -> None:
    """Raises ConfigError where a training step is impossible."""
    if setup.config.model.head == "deeplabv3" and setup.batch < 2:
        raise ConfigError(
            "a training step needs --batch 2 or more: deeplabv3 normalises one pooled vector per image"
        )


def measure(
    subject: Subject,
    rows: Sequence[Way],
    repeats: int,
    memory: bool = True,
    progress: bool = False,
    notes: Callable[[str], None] = lambda note: None,
) -> list[dict[str, Any]]:
    """Run the ways of one scope in turns; a plain dict of results for each, the baseline first.

    A peer that cannot run is left out and reported to `notes`. Peers' memory is not measured: their runtimes
    reserve it as they compile, before a run.
    """
    runs: dict[Way, Run] = {}
    for way in tqdm(rows, desc=f"{rows[0].scope}: first runs", disable=not progress, leave=False):
        try:
            run = subject.run(way)
            run()
        except Exception as error:
            if way.kind != "peer":
                raise
            notes(f"{way.scope}: {way.engine} not measured: {_first_line(error)}")
            continue
        runs[way] = run
    named = {f"{number}": run for number, run in enumerate(runs.values())}
    layouts = {way.fine_fraction: way for way in runs if way.fine_fraction is not None}
    named |= {f"layout {fraction}": subject.layout_run(way) for fraction, way in layouts.items()}
    times = interleaved(named, repeats, subject.device, warmup=1)
    results: list[dict[str, Any]] = []
    for number, way in enumerate(tqdm(runs, desc="memory", disable=not progress or not memory, leave=False)):
        measured = memory and way.kind != "peer"
        peak = peak_memory(prepare_way, (subject.setup, way), subject.device) if measured else None
        layout = times.get(f"layout {way.fine_fraction}")
        result = _result(way, times[f"{number}"], layout, subject.cost(way), peak)
        results.append(result | {"stored_mib": subject.stored_mib(way)})
    return _with_ratios(results)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _result(
    way: Way, time: Latency, layout: Latency | None, macs: Macs, peak: float | None
) -> dict[str, Any]:
    return dataclasses.asdict(way) | {
        "network": way.name,
        "form": way.form,
        "milliseconds": time.median,
        "spread": time.spread,
        "quartiles": time.quartiles,
        "samples": time.samples,
        "gmacs": macs.total / 1e9,
        "gmacs_hits": macs.hits / 1e9,
        "peak_mib": peak,
        "layout_share": None if layout is None else 100 * layout.median / time.median,
    }


def _with_ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed-up and ratio of multiply-adds over the first row."""
    for row in results:
        row["speedup"] = results[0]["milliseconds"] / row["milliseconds"]
        row["mac_ratio"] = results[0]["gmacs"] / row["gmacs"]
        row["speedup_per_mac_ratio"] = row["speedup"] / row["mac_ratio"]
    return results
