"""One network run in many ways on one picture: time, multiply-adds and memory against the dense one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparse_seg.errors import SparseSegError
from sparse_seg.lab.benchmark.subject import Case, Subject, prepare_case
from sparse_seg.lab.latency import Latency, Run, interleaved, peak_memory
from sparse_seg.progress import bar
from sparse_seg.run.way import Way


def cases(
    scope: str,
    fractions: Sequence[float],
    engines: Sequence[str],
    strides: Sequence[int],
    policies: Sequence[str] = (),
) -> list[Case]:
    """All rows of a scope, the baseline (dense at the finest of the strides) first.

    Args:
        policies: beside the config's own, by the engine gather; `given`: the config's mask, ready made.
    """
    ends = (strides[0], strides[-1]) if scope == "network" else strides[:1]
    rows = [Case(scope, "dense", Way.dense(stride)) for stride in ends]
    for fraction in fractions:
        rows += [Case(scope, "selective", Way(None, None, fraction, engine=engine)) for engine in engines]
        for policy in policies if scope == "network" else ():
            given = policy == "given"
            way = Way(None, None if given else policy, fraction, engine="gather")
            rows.append(Case(scope, "selective", way, given))
    return rows


def measure(
    subject: Subject,
    rows: Sequence[Case],
    repeats: int,
    memory: bool = True,
    progress: bool = False,
    notes: Callable[[str], None] = lambda note: None,
) -> list[dict[str, Any]]:
    """Run the cases of one scope in turns; a plain dict of results for each, the baseline first.

    A peer or an engine that cannot run is left out and reported to `notes`. Peers' memory is not measured:
    their runtimes reserve it as they compile, before a run.
    """
    runs: dict[Case, Run] = {}
    for case in bar(rows, f"{rows[0].scope}: first runs", len(rows), progress, "run"):
        try:
            run = subject.run(case)
            run()
        except Exception as error:  # a peer's may be of any kind
            refused = case.way.engine == "spconv" and isinstance(error, SparseSegError)
            if case.kind != "peer" and not refused:
                raise
            reason = str(error) if refused else _first_line(error)
            notes(f"{case.scope}: {case.form} not measured: {reason}")
            continue
        runs[case] = run
    named = {f"{number}": run for number, run in enumerate(runs.values())}
    times = interleaved(named, repeats, subject.device, warmup=1)
    results: list[dict[str, Any]] = []
    for number, case in enumerate(bar(runs, "memory", len(runs), progress and memory, "run")):
        measured = memory and case.kind != "peer"
        peak = peak_memory(prepare_case, (subject.setup, case), subject.device) if measured else None
        result = _result(case, times[f"{number}"], subject.macs(case), peak)
        results.append(result | {"stored_mib": subject.stored_mib(case)})
    return _with_ratios(results)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _result(case: Case, time: Latency, macs: int, peak: float | None) -> dict[str, Any]:
    return case.as_row() | {
        "milliseconds": time.median,
        "spread": time.spread,
        "quartiles": time.quartiles,
        "samples": time.samples,
        "gmacs": macs / 1e9,
        "peak_mib": peak,
    }


def _with_ratios(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed-up and ratio of multiply-adds over the first row."""
    for row in results:
        row["speedup"] = results[0]["milliseconds"] / row["milliseconds"]
        row["mac_ratio"] = results[0]["gmacs"] / row["gmacs"]
        row["speedup_per_mac_ratio"] = row["speedup"] / row["mac_ratio"]
    return results
