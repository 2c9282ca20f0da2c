"""Every way to run a network on a CUDA device, dense and selective, in each precision.

A light network's time there is its kernels' launches, so each network that has fixed shapes also runs as one
CUDA graph: the dense ones and the static form.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.export.network import ExportOptions, StaticNetwork
from sparse_seg.lab.benchmark.subject import Case, Setup, Subject
from sparse_seg.lab.latency import Run, interleaved
from sparse_seg.models.way import Way

PRECISIONS = {"fp32": (torch.float32, False), "tf32": (torch.float32, True), "fp16": (torch.float16, True)}


@contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """Whether convolutions and matrix products of float32 may run in TF32 (10 bits of mantissa)."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = tf32
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def measure_gpu(
    setup: Setup,
    fraction: float,
    repeats: int = 10,
    compiled: bool = False,
    notes: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """One row a run: median ms of images to logits, spread, and the relative difference of its logits.

    Args:
        setup: its dtype is `fp32`, `tf32` or `fp16`.
        fraction: of fine blocks.
        compiled: also `torch.compile`, which takes minutes.
        notes: told which runs fail, and why.
    """
    dtype, tf32 = PRECISIONS[setup.dtype]
    device = torch.device(setup.device)
    with precision(tf32), torch.inference_mode():
        runs, errors = dict[str, Run](), dict[str, float]()
        expected: dict[str, Tensor] = {}
        for name, kind, make in ways(setup, dtype, fraction, compiled):
            try:
                run = make()
                logits = run().float()
                expected.setdefault(kind, logits)
                difference = (logits - expected[kind]).abs().max() / expected[kind].abs().max()
                runs[name], errors[name] = run, difference.item()
            except Exception as error:  # any runtime's: the others are measured all the same
                notes(
                    f"{name} not measured: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                )
        times = interleaved(runs, repeats, device, warmup=2)
    cell = {"size": list(setup.size), "batch": setup.batch, "precision": setup.dtype}
    return [
        cell | {"run": name, "milliseconds": time.median, "spread": time.spread, "difference": errors[name]}
        for name, time in times.items()
    ]


def ways(
    setup: Setup, dtype: torch.dtype, fraction: float, compiled: bool
) -> Iterator[tuple[str, str, Callable[[], Callable[[], Tensor]]]]:
    """Name, the network it is (runs of one are to agree), and what makes the run."""
    name = str(dtype).removeprefix("torch.")
    subject = Subject(Setup(setup.config, setup.checkpoint, setup.size, setup.batch, setup.device, name))
    images = subject.images.contiguous(memory_format=torch.channels_last)

    def plain(stride: int) -> nn.Module:
        return subject.plain_module(Case("network", "plain", Way(stride)))[0]

    def selective(engine: str, fast: bool = False) -> Run:
        return subject.run(Case("network", "selective", Way(None, None, fraction, engine=engine), fast))

    def static() -> Callable[[Tensor], Tensor]:
        options = ExportOptions(
            setup.size,
            setup.batch,
            None,
            fraction,
            logits=True,
            ghosts=False,
            tiles=False,
            mean=(0,) * 3,
            std=(1,) * 3,
        )
        network = StaticNetwork(copy.deepcopy(subject.float_model).cpu(), options).to(subject.device, dtype)
        return lambda given: network(given)[-1]

    for stride in (8, 16):
        network = plain(stride)
        yield f"dense OS{stride}, cuDNN", f"OS{stride}", partial(calling, network, images)
        yield f"dense OS{stride}, CUDA graph", f"OS{stride}", partial(graphed, network, images)
    yield "selective, gather", "selective", lambda: selective("gather")
    yield "selective, gather, folded", "selective", lambda: selective("gather", True)
    yield "selective, spconv", "selective", lambda: selective("spconv")
    yield "selective, static", "selective", lambda: calling(static(), images)
    yield "selective, static, CUDA graph", "selective", lambda: graphed(static(), images)
    if compiled:
        yield "dense OS8, torch.compile", "OS8", lambda: graphed(torch.compile(plain(8)), images)
        yield (
            "selective, static, torch.compile",
            "selective",
            lambda: graphed(torch.compile(static()), images),
        )


def calling(network: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    """A run of a network as it is."""
    return torch.inference_mode()(lambda: network(images))


def graphed(network: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    """A run that replays a network as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(side):
        for _ in range(3):  # algorithms are chosen, code is compiled
            network(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        out = network(images)

    def replay() -> Tensor:
        _ = network, images  # what the graph reads lives on
        graph.replay()
        return out

    return replay


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line a run; beside it the ratio to the fastest dense OS8 of its cell."""
    lines = [
        "| network | size | batch | precision | run | ms | ± | of dense OS8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cell = [
            one for one in rows if all(one[k] == row[k] for k in ("network", "size", "batch", "precision"))
        ]
        dense = min(
            (one["milliseconds"] for one in cell if one["run"].startswith("dense OS8")), default=float("nan")
        )
        lines.append(
            f"| {row['network']} | {row['size'][0]}x{row['size'][1]} | {row['batch']} | {row['precision']} "
            f"| {row['run']} | {row['milliseconds']:.2f} | {row['spread']:.2f} "
            f"| {row['milliseconds'] / dense:.2f} |"
        )
    return "\n".join(lines) + "\n"


class Deadline:
    """Minutes that may pass."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.end
