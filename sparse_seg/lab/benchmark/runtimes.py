"""Time exported graphs, each in a process of its own: in one, their threads disturb each other.

Processes take turns, so that drift of the machine falls on all alike.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from sparse_seg.errors import MeasurementError
from sparse_seg.export.network import ExportOptions
from sparse_seg.export.runtime import open_session
from sparse_seg.export.write import export_onnx
from sparse_seg.lab.latency import Latency
from sparse_seg.models.segmentor import SelectiveSegmentor


@dataclass(frozen=True)
class Timed:
    """A graph to time.

    Args:
        path: of the ONNX file.
        runtime: `onnxruntime` or `openvino`.
    """

    path: str
    runtime: str = "onnxruntime"


def time_graphs(
    graphs: Mapping[str, Timed], images: np.ndarray, threads: int, turns: int = 10, runs: int = 5
) -> dict[str, Latency]:
    """Milliseconds of each graph, `turns * runs` samples.

    Args:
        images: the input `images`.
        runs: of a turn, after one that does not count.

    Raises:
        MeasurementError: a graph failed to load or to run.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    try:
        for name, graph in graphs.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, graph, images, threads), daemon=True)
            process.start()
            theirs.close()
            workers[name] = process, ours
            _receive(name, ours)
        for _ in range(turns):
            for name, (_, connection) in workers.items():
                connection.send(runs)
                samples[name] += _receive(name, connection)
    finally:
        for process, connection in workers.values():
            connection.close()
            process.join(timeout=10)
            process.terminate()
    return {name: Latency(tuple(values)) for name, values in samples.items()}


def _receive(name: str, connection: Connection) -> list[float]:
    try:
        answer = connection.recv()
    except EOFError:
        answer = "its process died"
    if isinstance(answer, str):
        raise MeasurementError(f"{name} cannot be timed: {answer}")
    return answer


def _work(connection: Connection, graph: Timed, images: np.ndarray, threads: int) -> None:
    """Answer each number of runs with as many milliseconds, until the other side closes."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        session = open_session(graph.path, graph.runtime, threads)
        session(images=images)
        connection.send([])
        while True:
            runs, times = connection.recv(), []
            session(images=images)
            for _ in range(runs):
                start = time.perf_counter()
                session(images=images)
                times.append(1000 * (time.perf_counter() - start))
            connection.send(times)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())}")


def time_network(
    model: SelectiveSegmentor,
    image: np.ndarray,
    threads: int,
    runtimes: Sequence[str] = ("onnxruntime",),
    merges: Sequence[str] = ("whole",),
    turns: int = 10,
    runs: int = 5,
) -> dict[str, Latency]:
    """Time a model's two dense forms and its selective one, exported, in each runtime.

    Args:
        image: float32 `[1, 3, H, W]` in 0..1. The time of a selective run depends on it: so do its ghosts.

    Returns:
        By name: `fine RUNTIME`, `coarse RUNTIME`, and `selective RUNTIME MERGE`.
    """
    size = (int(image.shape[2]), int(image.shape[3]))
    finest, coarsest = model.strides[0], model.strides[-1]
    forms = {"fine": ExportOptions(size, dense=finest), "coarse": ExportOptions(size, dense=coarsest)}
    forms |= {f"selective {merge}": ExportOptions(size, merge=merge) for merge in merges}
    with tempfile.TemporaryDirectory() as folder:
        graphs: dict[str, Timed] = {}
        for number, (form, options) in enumerate(forms.items()):
            path = f"{folder}/{number}.onnx"
            export_onnx(model, path, options, check=False)
            kind, _, merge = form.partition(" ")
            graphs |= {f"{kind} {runtime} {merge}".strip(): Timed(path, runtime) for runtime in runtimes}
        return time_graphs(graphs, image, threads, turns, runs)


def share(value: float, coarse: float, fine: float) -> float:
    """How far a value lies on the way from that of the dense coarse network to that of the dense fine one."""
    return (value - coarse) / (fine - coarse)


def lift(accuracies: tuple[float, float, float], times: tuple[float, float, float]) -> float:
    """Accuracy share minus time share, each of (selective, dense coarse, dense fine).

    A mixture of the two dense networks has lift 0. Times are of the fastest runtime for each.
    """
    return share(*accuracies) - share(*times)


def best(timed: Mapping[str, Latency], kind: str) -> float:
    """The fastest median among the runs whose name begins with `kind`."""
    return min(run.median for name, run in timed.items() if name.startswith(kind))


def table(timed: Mapping[str, Latency]) -> str:
    """Rows of ms, ratio to the fastest dense fine run, and time share.

    The dense runs are those whose names begin with `fine` and `coarse`.
    """
    fine, coarse = best(timed, "fine"), best(timed, "coarse")
    lines = [f"{'run':32s} {'ms':>8s} {'least':>8s} {'of fine':>8s} {'time share':>10s}"]
    for name, run in timed.items():
        part = statistics.median(run.samples)
        least, ratio = min(run.samples), part / fine
        lines.append(f"{name:32s} {part:8.1f} {least:8.1f} {ratio:8.2f} {share(part, coarse, fine):10.2f}")
    return "\n".join(lines)
