"""Time exported graphs, each in a process of its own: in one, their threads disturb each other.

Processes take turns, so that drift of the machine falls on all alike.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_seg.errors import ConfigError, MeasurementError, import_package
from sparse_seg.export.onnx_file import INSTALL
from sparse_seg.export.options import ExportOptions
from sparse_seg.export.runtime import RUNTIMES, open_session
from sparse_seg.export.write import export_onnx
from sparse_seg.lab.latency import Latency
from sparse_seg.lab.report.tables import Column
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way

TORCH = "torch"  # in place of a runtime: the network itself


@dataclass(frozen=True)
class Timed:
    """A graph to time.

    Args:
        path: of the ONNX file; with the runtime `torch`, of a model and its way.
        runtime: `onnxruntime`, `openvino` or `torch`.
        input: the name of the graph's one input.
    """

    path: str
    runtime: str = "onnxruntime"
    input: str = "images"


def time_graphs(
    graphs: Mapping[str, Timed], images: np.ndarray, threads: int, turns: int = 10, runs: int = 5
) -> dict[str, Latency]:
    """Milliseconds of each graph, `turns * runs` samples.

    Args:
        images: the one input of all.
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
        if graph.runtime == TORCH:
            session = _torch_session(graph.path, threads)
        else:
            session = open_session(graph.path, graph.runtime, threads)
        given = {graph.input: images}
        session(**given)
        connection.send([])
        while True:
            runs, times = connection.recv(), []
            session(**given)
            for _ in range(runs):
                start = time.perf_counter()
                session(**given)
                times.append(1000 * (time.perf_counter() - start))
            connection.send(times)
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())}")


def time_network(
    model: SelectiveNetwork,
    image: np.ndarray,
    threads: int,
    runtimes: Sequence[str] = ("onnxruntime",),
    merges: Sequence[str] = ("whole",),
    turns: int = 10,
    runs: int = 5,
    peers: Mapping[str, Timed] | None = None,
) -> dict[str, Latency]:
    """Time a model's two dense forms and its selective one in each runtime.

    Args:
        image: normalised, float32 `[1, 3, H, W]`; a selective run's time depends on it, by its ghosts.
        runtimes: of exported graphs; `torch` for the network made by `for_inference`.
        peers: other graphs, which take their turns as well, see `peer_graphs`.

    Returns:
        By name: `fine RUNTIME`, `coarse RUNTIME`, `selective RUNTIME MERGE`, and the names of `peers`.
    """
    size = (int(image.shape[2]), int(image.shape[3]))
    ends = {"fine": model.strides[0], "coarse": model.strides[-1]}
    ways = {kind: Way.dense(stride) for kind, stride in ends.items()}
    ways |= {f"selective {merge}": Way(merge=merge) for merge in merges}
    with tempfile.TemporaryDirectory() as folder:
        graphs: dict[str, Timed] = {}
        for number, (form, way) in enumerate(ways.items()):
            kind, _, merge = form.partition(" ")
            for runtime in runtimes:
                path = f"{folder}/{number}.onnx"
                if runtime == TORCH:
                    path = f"{folder}/{number}.pt"
                    torch.save((model, way), path)
                elif not os.path.exists(path):
                    options = ExportOptions(
                        size, dense=way.output_stride, merge=way.merge, mean=(0, 0, 0), std=(1, 1, 1)
                    )
                    export_onnx(model, path, options, check=False)
                graphs[f"{kind} {runtime} {merge}".strip()] = Timed(path, runtime)
        return time_graphs(graphs | dict(peers or {}), image, threads, turns, runs)


def peer_graphs(paths: Sequence[str], runtimes: Sequence[str], shape: Sequence[int]) -> dict[str, Timed]:
    """Networks of others, as ONNX files with one input, to be timed in each runtime.

    Args:
        runtimes: those that run no graphs are passed over.
        shape: of the images, `[B, 3, H, W]`.

    Returns:
        By name: `peer RUNTIME FILE`, without the suffix of the file.

    Raises:
        ConfigError: a file is missing or no ONNX file, has other inputs, or another one's name.
        SparseSegError: onnx is not installed.
    """
    names = [Path(path).stem for path in paths]
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1:
            raise ConfigError(f"{path}: another peer is called {name}, too; rename one")
    inputs = [_only_input(path, shape) for path in paths]
    return {
        f"peer {runtime} {name}": Timed(path, runtime, given)
        for path, name, given in zip(paths, names, inputs, strict=True)
        for runtime in runtimes
        if runtime in RUNTIMES
    }


def _only_input(path: str, shape: Sequence[int]) -> str:
    """The name of a graph's input, which must take float32 images of a shape."""
    onnx = import_package("onnx", f"reading ONNX files needs the package onnx: {INSTALL}", "load")
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception:  # protobuf's own error, whose module moves
        raise ConfigError(f"{path} is no ONNX file") from None
    weights = {one.name for one in graph.initializer}
    given = [one for one in graph.input if one.name not in weights]
    if len(given) != 1:
        raise ConfigError(f"{path} has {len(given)} inputs; a peer takes images alone")
    kind = given[0].type.tensor_type
    sides = [one.dim_value if one.HasField("dim_value") else None for one in kind.shape.dim]
    fits = len(sides) == len(shape) and all(a in (None, b) for a, b in zip(sides, shape, strict=True))
    if kind.elem_type != onnx.TensorProto.FLOAT or not fits:
        found = ", ".join("?" if side is None else str(side) for side in sides)
        raise ConfigError(
            f"{path}: input {given[0].name} is {onnx.TensorProto.DataType.Name(kind.elem_type)} [{found}]; "
            f"export it for FLOAT {list(shape)}, or name another --size"
        )
    return given[0].name


def _torch_session(path: str, threads: int) -> Callable[..., object]:
    torch.set_num_threads(threads)
    model, way = torch.load(path, weights_only=False)  # written by time_network
    fast = model.for_inference()

    @torch.inference_mode()
    def session(images: np.ndarray) -> object:
        return fast.start(torch.from_numpy(images)).follow(way).classes()

    return session


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


def rows(
    timed: Mapping[str, Latency], accuracies: tuple[float, float, Mapping[str, float]] | None = None
) -> list[dict[str, Any]]:
    """A row a run: median and least ms, ratio to the fastest dense fine run, time share and, with accuracies,
    lift.

    Args:
        timed: of `time_network`.
        accuracies: mIoU of the dense coarse network, of the dense fine one, and of the selective by merge.
    """
    fine, coarse = best(timed, "fine"), best(timed, "coarse")
    found = list[dict[str, Any]]()
    for name, run in timed.items():
        ms, merge = run.median, name.split()[-1] if name.startswith("selective") else ""
        row = {"run": name, "milliseconds": ms, "least": min(run.samples), "of_fine": ms / fine}
        if not name.startswith("peer"):
            row["time_share"] = share(ms, coarse, fine)
        if accuracies is not None and merge in accuracies[2]:
            ends, selective = accuracies[:2], accuracies[2][merge]
            row["accuracy_share"] = share(selective, *ends)
            row["lift"] = lift((selective, *ends), (ms, coarse, fine))
        found.append(row)
    return found


COLUMNS = (
    Column("run", "run"),
    Column("milliseconds", "ms", "{:.1f}"),
    Column("least", "least", "{:.1f}"),
    Column("of_fine", "of dense", "{:.2f}"),
    Column("time_share", "time share", "{:.2f}"),
    Column("accuracy_share", "accuracy share", "{:.2f}"),
    Column("lift", "lift", "{:.2f}"),
)
