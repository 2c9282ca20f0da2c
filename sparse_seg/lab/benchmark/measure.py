"""One network run in many ways on one picture: time, multiply-adds and memory against the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sparse_seg.errors import SparseSegError, first_line
from sparse_seg.lab.benchmark.subject import Case, Subject, prepare_case
from sparse_seg.lab.latency import Run, interleaved, peak_memory
from sparse_seg.progress import bar
from sparse_seg.run.way import Way

COLUMNS = (
    *("scope", "network", "form", "milliseconds", "spread", "gmacs"),
    *("speedup", "mac_ratio", "speedup_per_mac_ratio", "peak_mib"),
)


def cases(
    scope: str,
    fractions: Sequence[float],
    engines: Sequence[str],
    strides: Sequence[int],
    policies: Sequence[str] = (),
    peers: Iterable[str] = (),
) -> list[Case]:
    """All rows of a scope, the baseline (dense at the finest of the strides) first.

    Args:
        policies: beside the config's own, by the engine gather; `given`: the config's mask, ready made.
        peers: other runtimes, for the baseline. These two are of scope `network` alone.
    """
    ends = (strides[0], strides[-1]) if scope == "network" else strides[:1]
    rows = [Case(scope, Way.dense(stride)) for stride in ends]
    for fraction in fractions:
        rows += [Case(scope, Way(None, None, fraction, engine=engine)) for engine in engines]
        for policy in policies if scope == "network" else ():
            given = policy == "given"
            rows.append(Case(scope, Way(None, None if given else policy, fraction, engine="gather"), given))
    return rows + [Case(scope, rows[0].way, peer=peer) for peer in peers if scope == "network"]


def measure_cases(
    subject: Subject,
    rows: Sequence[Case],
    repeats: int,
    memory: bool = True,
    notes: Callable[[str], None] = lambda note: None,
) -> list[dict[str, Any]]:
    """Run the cases of one scope in turns; a plain dict of results for each, the baseline first.

    A peer or an engine that cannot run is left out and reported to `notes`. Peers' memory is not measured:
    their runtimes reserve it as they compile, before a run.
    """
    runs: dict[Case, Run] = {}
    for case in bar(rows, f"{rows[0].scope}: first runs", len(rows), unit="run"):
        try:
            run = subject.run(case)
            run()
            runs[case] = run
        except Exception as error:  # a peer's may be of any kind
            refused = case.way.engine == "spconv" and isinstance(error, SparseSegError)
            if case.peer is None and not refused:
                raise
            reason = str(error) if refused else f"{type(error).__name__}: {first_line(error)}"
            notes(f"{case.scope}: {case.as_row()['form']} not measured: {reason}")
    times = interleaved(runs, repeats, subject.device, warmup=1)
    results: list[dict[str, Any]] = []
    for case, time in bar(times.items(), "memory", len(times), memory, "run"):
        measured = memory and case.peer is None
        peak = peak_memory(prepare_case, (subject.setup, case), subject.device) if measured else None
        row = case.as_row() | subject.costs(case) | {"milliseconds": time.median, "spread": time.spread}
        row |= {"quartiles": time.quartiles, "samples": time.samples, "peak_mib": peak}
        first = results[0] if results else row
        row["speedup"] = first["milliseconds"] / row["milliseconds"]
        row["mac_ratio"] = first["gmacs"] / row["gmacs"]
        row["speedup_per_mac_ratio"] = row["speedup"] / row["mac_ratio"]
        results.append(row)
    return results
