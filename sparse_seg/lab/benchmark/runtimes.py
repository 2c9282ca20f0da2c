"""Time a network, and others', in several runtimes, each run in a process of its own."""

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_seg.errors import ConfigError, import_package
from sparse_seg.export.onnx_file import export_onnx
from sparse_seg.export.runner import TORCH
from sparse_seg.export.runtime import INSTALL, RUNTIMES, open_session
from sparse_seg.export.segmentor import options_of
from sparse_seg.lab.latency import Latency, Run, timed_apart
from sparse_seg.masks import parse_policy
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way

Opener = Callable[..., Run]  # `open_run`, but for the images


def open_run(path: str, runtime: str, images: np.ndarray, given: str = "images") -> Run:
    """A run on all threads of this process.

    Args:
        path: of an ONNX file; with the runtime `torch`, of a model and its way.
        given: the name of the graph's one input.
    """
    if runtime != TORCH:
        return partial(open_session(path, runtime, torch.get_num_threads()), **{given: images})
    model, way = torch.load(path, weights_only=False)  # written by time_network
    fast, tensor = model.for_inference(), torch.from_numpy(images)
    return torch.inference_mode()(lambda: fast.start(tensor).follow(way).classes())


def time_network(
    model: SelectiveNetwork,
    image: np.ndarray,
    threads: int,
    runtimes: Sequence[str] = ("onnxruntime",),
    merges: Sequence[str] = ("whole",),
    fractions: Sequence[float | None] = (None,),
    turns: int = 10,
    repeats: int = 5,
    peers: Mapping[str, Opener] | None = None,
) -> dict[str, Latency]:
    """Time a model's two dense forms and its selective one in each runtime.

    Args:
        image: normalised, float32 `[1, 3, H, W]`; a selective run's time depends on it, by its ghosts.
        runtimes: of exported graphs; `torch` for the network made by `for_inference`.
        fractions: of fine blocks; None for the model's own.
        peers: other graphs, which take their turns as well, see `peer_graphs`.

    Returns:
        By name: `fine RUNTIME`, `coarse RUNTIME`, `selective RUNTIME MERGE` (and `f=FRACTION`), and the names
        of `peers`.
    """
    size = (int(image.shape[2]), int(image.shape[3]))
    ways = {"fine": Way.dense(model.strides[0]), "coarse": Way.dense(model.strides[-1])}
    for merge, fraction in itertools.product(merges, fractions):
        ways[f"selective {form_of(merge, fraction)}"] = Way(merge=merge, fine_fraction=fraction)
    with tempfile.TemporaryDirectory() as folder:
        runs = dict[str, Opener]()
        for number, (name, way) in enumerate(ways.items()):
            kind, _, form = name.partition(" ")
            for runtime in runtimes:
                path = f"{folder}/{number}.{'pt' if runtime == TORCH else 'onnx'}"
                if runtime == TORCH:
                    torch.save((model, way), path)
                elif not os.path.exists(path):
                    options = options_of(size, 1, way, None, fine_fraction=way.fine_fraction)
                    export_onnx(model, path, options, check=False)
                runs[f"{kind} {runtime} {form}".strip()] = partial(open_run, path, runtime)
        runs |= peers or {}
        prepares = {name: partial(run, images=image) for name, run in runs.items()}
        return timed_apart(prepares, threads, turns, repeats)


def form_of(merge: str, fraction: float | None) -> str:
    """The end of a selective run's name."""
    return merge if fraction is None else f"{merge} f={fraction:g}"


def peer_graphs(paths: Sequence[str], runtimes: Sequence[str], shape: Sequence[int]) -> dict[str, Opener]:
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
        f"peer {runtime} {name}": partial(open_run, path, runtime, given=given)
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


def share(value: float, coarse: float, fine: float) -> float:
    """How far a value lies on the way from that of the dense coarse network to that of the dense fine one."""
    return (value - coarse) / (fine - coarse)


def lift(accuracies: tuple[float, float, float], times: tuple[float, float, float]) -> float:
    """Accuracy share minus time share, each of (selective, dense coarse, dense fine).

    A mixture of the two dense networks has lift 0. Times are of the fastest runtime for each.
    """
    return share(*accuracies) - share(*times)


def _is_own(row: Mapping[str, Any], model: SelectiveNetwork) -> bool:
    """Whether a row was measured under the model's own policy, with its options, and exchange rule."""
    same = parse_policy(row["policy"], model.mask) == model.mask
    return same and row.get("exchange") in (None, model.exchange)


def read_accuracies(path: str, model: SelectiveNetwork) -> tuple[float, float, dict[str, float]]:
    """mIoU of the dense coarse network, of the dense fine one, and of the selective one by form, from a
    comparison's file.

    Raises:
        ConfigError: there is no such file, or one without both dense runs.
    """
    try:
        found = json.loads(Path(path).read_text())["rows"]
        dense = {row["output_stride"]: row["miou"] for row in found if row["policy"] is None}
        selective: dict[str, float] = {}
        for row in found:
            if row["policy"] and _is_own(row, model):
                merge, fraction = row.get("merge") or model.merge, row["fine_fraction"]
                selective[form_of(merge, fraction)] = row["miou"]
                if fraction == model.policy.fine_fraction:
                    selective[merge] = row["miou"]
        return dense[model.strides[-1]], dense[model.strides[0]], selective
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is no JSON file of evaluate --compare with both dense runs") from None


def rows(
    timed: Mapping[str, Latency], accuracies: tuple[float, float, Mapping[str, float]] | None = None
) -> list[dict[str, Any]]:
    """A row a run: median and least ms, ratio to the fastest dense fine run, time share and, with accuracies,
    lift.

    Args:
        timed: of `time_network`.
        accuracies: of `read_accuracies`.
    """
    fine, coarse = (
        min(run.median for name, run in timed.items() if name.startswith(kind)) for kind in ("fine", "coarse")
    )
    found = list[dict[str, Any]]()
    for name, run in timed.items():
        ms, (kind, _, *form) = run.median, name.split(maxsplit=2)
        row = {"run": name, "milliseconds": ms, "least": min(run.samples), "of_fine": ms / fine}
        if kind != "peer":
            row["time_share"] = share(ms, coarse, fine)
        if kind == "selective" and accuracies is not None and form[0] in accuracies[2]:
            ends, selective = accuracies[:2], accuracies[2][form[0]]
            row["accuracy_share"] = share(selective, *ends)
            row["lift"] = lift((selective, *ends), (ms, coarse, fine))
        found.append(row)
    return found
