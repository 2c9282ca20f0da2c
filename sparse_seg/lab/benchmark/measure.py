"""One network run in many ways on one picture: time, multiply-adds and memory against the plain dense one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparse_seg.errors import ConfigError, SparseSegError
from sparse_seg.lab.benchmark.subject import Case, Setup, Subject, prepare_case
from sparse_seg.lab.latency import Latency, Run, interleaved, peak_memory
from sparse_seg.run.way import Way
from sparse_seg.progress import bar
from sparse_seg.registry import POOLING_HEADS
from sparse_seg.sparse import SelectiveConv2d, SiteLayout


def cases(
    scope: str,
    fractions: Sequence[float],
    engines: Sequence[str],
    folded: bool,
    policies: Sequence[str] = (),
) -> list[Case]:
    """All rows of a scope, the baseline (plain dense OS8) first; `policies` beside the config's own."""
    rows = [Case(scope, "plain")]

    def selective(fraction: float, engine: str, folded: bool = False, policy: str | None = None) -> Case:
        way = Way(None, None if policy == "given" else policy, fraction, engine=engine)
        return Case(scope, "selective", way, folded, given=policy == "given")

    if scope == "train":
        return rows + [selective(f, engine) for f in fractions for engine in engines]
    forms = (False, True) if folded else (False,)
    rows += [Case(scope, "plain", Way(16))]
    rows += [Case(scope, "dense", Way(8, engine="gather"), form) for form in forms]
    for fraction in fractions:
        rows += [selective(fraction, engine) for engine in engines]
        if folded:
            rows.append(selective(fraction, "gather", folded=True))
        if scope == "network":  # the other scope starts behind the mask
            rows += [selective(fraction, "gather", folded, policy) for policy in policies]
    return rows


def captured_cases(
    scope: str, fractions: Sequence[float], strides: Sequence[int], policies: Sequence[str] = ()
) -> list[Case]:
    """As `cases`, of a captured network, which has no plain twin and one engine: dense at its finest stride
    is the baseline."""
    masks = [None, *policies] if scope == "network" else [None]
    forms = (False, True) if scope == "network" else (False,)
    ends = (strides[0], strides[-1]) if scope == "network" else strides[:1]
    rows = [Case(scope, "dense", Way(stride), form) for stride in ends for form in forms]
    for fraction, policy in itertools.product(fractions, masks):
        way = Way(None, None if policy == "given" else policy, fraction)
        given = policy == "given"
        rows += [
            Case(scope, "selective", way, form, given) for form in (forms if policy is None else forms[1:])
        ]
    return rows


@torch.enable_grad()
def engine_fault(engine: str, device: torch.device, dtype: torch.dtype, train: bool) -> str | None:
    """Why an engine cannot run here, found by trying; None if it can."""
    conv = SelectiveConv2d(16, 16, 16, engine=engine).to(device, dtype).requires_grad_(train)
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
    head = setup.config.model.head
    if head in POOLING_HEADS and setup.batch < 2:
        raise ConfigError(
            f"a training step needs --batch 2 or more: {head} normalises one pooled vector per image"
        )


def measure(
    subject: Subject,
    rows: Sequence[Case],
    repeats: int,
    memory: bool = True,
    progress: bool = False,
    notes: Callable[[str], None] = lambda note: None,
) -> list[dict[str, Any]]:
    """Run the cases of one scope in turns; a plain dict of results for each, the baseline first.

    A peer that cannot run is left out and reported to `notes`. Peers' memory is not measured: their runtimes
    reserve it as they compile, before a run.
    """
    runs: dict[Case, Run] = {}
    for case in bar(rows, f"{rows[0].scope}: first runs", len(rows), progress, "run"):
        try:
            run = subject.run(case)
            run()
        except Exception as error:
            if case.kind != "peer":
                raise
            notes(f"{case.scope}: {case.peer} not measured: {_first_line(error)}")
            continue
        runs[case] = run
    named = {f"{number}": run for number, run in enumerate(runs.values())}
    layouts = {case.way.fine_fraction: case.way for case in runs if not case.way.is_dense}
    if not subject.is_captured:
        named |= {f"layout {fraction}": subject.layout_run(way) for fraction, way in layouts.items()}
    times = interleaved(named, repeats, subject.device, warmup=1)
    results: list[dict[str, Any]] = []
    for number, case in enumerate(bar(runs, "memory", len(runs), progress and memory, "run")):
        measured = memory and case.kind != "peer"
        peak = peak_memory(prepare_case, (subject.setup, case), subject.device) if measured else None
        layout = times.get(f"layout {case.way.fine_fraction}")
        result = _result(case, times[f"{number}"], layout, subject.macs(case), peak)
        results.append(result | {"stored_mib": subject.stored_mib(case)})
    return _with_ratios(results)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _result(
    case: Case, time: Latency, layout: Latency | None, macs: int, peak: float | None
) -> dict[str, Any]:
    return case.as_row() | {
        "milliseconds": time.median,
        "spread": time.spread,
        "quartiles": time.quartiles,
        "samples": time.samples,
        "gmacs": macs / 1e9,
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
