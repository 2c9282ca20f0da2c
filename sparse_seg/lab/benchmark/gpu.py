"""Every way to run a network on a CUDA device, dense and selective, in each precision.

A light network's time there is its kernels' launches, so each network that has fixed shapes also runs as one
CUDA graph: the dense ones and the static form.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_seg.export import ExportOptions, StaticNetwork
from sparse_seg.export.cuda_graph import graphed
from sparse_seg.lab.benchmark.subject import Case, Setup, Subject
from sparse_seg.lab.latency import Run, interleaved
from sparse_seg.run.way import Way
from sparse_seg.sites import EngineError, triton

PRECISIONS = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "fp16": (torch.float16, True),
    "bf16": (torch.bfloat16, True),
}


def measure_gpu(
    setup: Setup,
    tf32: bool,
    fraction: float,
    repeats: int = 10,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """One row a run: median ms of images to logits, spread, and the relative difference of its logits; of a
    run that fails, a line is printed.

    Args:
        fraction: of fine blocks.
        compiled: also `torch.compile`, which takes minutes.
    """
    runs, differences, expected = dict[str, Run](), dict[str, float](), dict[str, Tensor]()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True  # sizes are fixed: cuDNN tries its algorithms
    with torch.inference_mode():
        subject = Subject(setup)
        for name, kind, make in ways(subject, fraction, compiled):
            try:
                run = make()
                logits = run().float()
            except Exception as error:  # any runtime's: the others are measured all the same
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                print(f"{name} not measured: {reason}")
                continue
            first = expected.setdefault(kind, logits)
            differences[name] = ((logits - first).abs().max() / first.abs().max()).item()
            runs[name] = run
        times = interleaved(runs, repeats, subject.device, warmup=2)
    rows = {name: {"milliseconds": one.median, "spread": one.spread} for name, one in times.items()}
    return [{"run": name} | row | {"difference": differences[name]} for name, row in rows.items()]


def ways(
    subject: Subject, fraction: float, compiled: bool
) -> Iterator[tuple[str, str, Callable[[], Callable[[], Tensor]]]]:
    """Name, the network it is (runs of one are to agree), and what makes the run."""
    images = subject.images.contiguous(memory_format=torch.channels_last)
    dense = {stride: subject.dense_module(Way.dense(stride))[0] for stride in (8, 16)}

    def selective(engine: str) -> Run:
        return subject.run(Case("network", Way(None, None, fraction, engine=engine)))

    def checked(run: Run) -> Run:
        """A run by the engine triton; raises an EngineError where gather runs in its place."""
        run()
        if why := triton.problem(subject.device, subject.dtype):
            raise EngineError(why)
        return run

    def static(engine: str = "gather") -> Callable[[Tensor], Tensor]:
        size, batch = subject.setup.size, subject.setup.batch
        options = ExportOptions(
            size, batch, None, fraction, mean=(0,) * 3, std=(1,) * 3, logits=True, ghosts=False, tiles=False
        )
        model = copy.deepcopy(subject.float_model).cpu()
        model.settings = dataclasses.replace(model.settings, engine=engine)
        network = StaticNetwork(model, options)
        network.to(subject.device, subject.dtype)
        return lambda given: network.upsampling(network.grid_logits(given)[0])  # no argmax: dense has none

    for stride, network in dense.items():
        yield f"dense OS{stride}, cuDNN", f"OS{stride}", functools.partial(calling, network, images)
        yield f"dense OS{stride}, CUDA graph", f"OS{stride}", functools.partial(replaying, network, images)
    yield "selective, gather", "selective", lambda: selective("gather")
    yield "selective, spconv", "selective", lambda: selective("spconv")
    yield "selective, triton", "selective", lambda: checked(selective("triton"))
    yield "selective, static", "selective", lambda: calling(static(), images)
    yield "selective, static, CUDA graph", "selective", lambda: replaying(static(), images)
    name = "selective, static, triton, CUDA graph"
    yield name, "selective", lambda: checked(replaying(static("triton"), images))
    if compiled:
        tuned = functools.partial(torch.compile, mode="max-autotune-no-cudagraphs")  # the graph is ours
        yield "dense OS8, torch.compile", "OS8", lambda: replaying(tuned(dense[8]), images)
        name = "selective, static, torch.compile"
        yield name, "selective", lambda: replaying(tuned(static()), images)


def calling(network: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    """A run of a network as it is."""
    return torch.inference_mode()(lambda: network(images))


def replaying(network: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    """A run that replays a network as one CUDA graph."""
    replay = graphed(lambda given: (network(given),), images)
    return lambda: replay(images)[0]


def gpu_table(cells: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Markdown, a line a run; beside it the ratio to the fastest dense OS8 of its cell."""
    keys = ("network", "size", "batch", "precision", "run", "ms", "±", "of dense OS8")
    lines = [f"| {' | '.join(keys)} |", "|---" * len(keys) + "|"]
    for rows in cells:
        dense = [row["milliseconds"] for row in rows if row["run"].startswith("dense OS8")]
        for row in rows:
            values = [row[key] for key in keys[:5]] + [
                f"{row[key]:.2f}" for key in ("milliseconds", "spread")
            ]
            values[1] = "x".join(map(str, row["size"]))
            values.append(f"{row['milliseconds'] / min(dense):.2f}" if dense else "–")
            lines.append(f"| {' | '.join(map(str, values))} |")
    return "\n".join(lines) + "\n"
