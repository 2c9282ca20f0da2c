"""Every way to run a network on a CUDA device, dense and selective, in each precision.

A light network's time there is its kernels' launches, so each network that has fixed shapes also runs as one
CUDA graph: the dense ones and the static form.
"""

import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparse_seg.errors import MeasurementError
from sparse_seg.export import ExportOptions, StaticNetwork
from sparse_seg.export.cuda_graph import graphed
from sparse_seg.export.onnx_file import traced
from sparse_seg.export.runtime import check_runtime
from sparse_seg.lab.benchmark.measure import Case, Subject
from sparse_seg.lab.latency import Run, interleaved
from sparse_seg.run.way import Way
from sparse_seg.sites import EngineError, triton

PRECISIONS = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "fp16": (torch.float16, True),
    "bf16": (torch.bfloat16, True),
}
TENSORRT = "TensorrtExecutionProvider"


def measure_gpu(
    subject: Subject,
    tf32: bool,
    fraction: float,
    repeats: int = 10,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """One row a run: median ms of images to logits, spread, and the relative difference of its logits; of a
    run that fails, a line is printed.

    Args:
        fraction: of fine blocks.
        compiled: also `torch.compile` and TensorRT, which take minutes.
    """
    runs, differences, expected = dict[str, Run](), dict[str, float](), dict[str, Tensor]()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True  # sizes are fixed: cuDNN tries its algorithms
    with torch.inference_mode():
        for name, make in ways(subject, fraction, compiled):
            try:
                run = make()
                logits = run().float()
                first = expected.setdefault(name.partition(",")[0], logits)
                difference = ((logits - first).abs().max() / first.abs().max()).item()
            except Exception as error:  # any runtime's: the others are measured all the same
                print(f"{name} not measured: {in_one_line(error)}")
                continue
            runs[name], differences[name] = run, difference
        times = interleaved(runs, repeats, subject.device, warmup=2)
    rows = {name: {"milliseconds": one.median, "spread": one.spread} for name, one in times.items()}
    return [{"run": name} | row | {"difference": differences[name]} for name, row in rows.items()]


def ways(subject: Subject, fraction: float, compiled: bool) -> Iterator[tuple[str, Callable[[], Run]]]:
    """Name, which begins with the network's (runs of one are to agree), and what makes the run."""
    images = subject.images.contiguous(memory_format=torch.channels_last)

    def dense(stride: int) -> Callable[[Tensor], Tensor]:
        return lambda given: subject.folded_model.dense(given, stride)

    def selective(engine: str) -> Run:
        return subject.run(Case("network", Way(None, None, fraction, engine=engine)))

    def checked(run: Run) -> Run:
        """A run by the engine triton; raises an EngineError where gather runs in its place."""
        run()
        if why := triton.problem(subject.device, subject.dtype):
            raise EngineError(why)
        return run

    @functools.cache
    def built() -> StaticNetwork:
        size, batch = subject.size, subject.batch
        options = ExportOptions(
            size, batch, None, fraction, mean=(0,) * 3, std=(1,) * 3, logits=True, ghosts=False, tiles=False
        )
        return StaticNetwork(copy.deepcopy(subject.float_model).cpu(), options)

    def static(engine: str = "gather", second_stream: bool = False) -> Callable[[Tensor], Tensor]:
        network = copy.copy(built())  # of the same weights
        network.engine, network.second_stream = engine, second_stream
        network.to(subject.device, subject.dtype)
        return lambda given: network.upsampling(network.grid_logits(given)[0])  # no argmax: dense has none

    def captured(engine: str, second_stream: bool) -> Run:
        run = replaying(static(engine, second_stream), images)
        return checked(run) if engine == "triton" else run

    for stride in (8, 16):
        yield f"dense OS{stride}, cuDNN", functools.partial(calling, dense(stride), images)
        yield f"dense OS{stride}, CUDA graph", functools.partial(replaying, dense(stride), images)
    yield "selective, gather", lambda: selective("gather")
    yield "selective, spconv", lambda: selective("spconv")
    yield "selective, triton", lambda: checked(selective("triton"))
    yield "selective, static", lambda: calling(static(), images)
    for engine, second in itertools.product(("gather", "triton"), (False, True)):
        forms = ["triton"] * (engine == "triton") + ["2 streams"] * second
        name = ", ".join(["selective, static", *forms, "CUDA graph"])
        yield name, functools.partial(captured, engine, second)
    if compiled:
        half = {"trt_fp16_enable": images.dtype == torch.float16}
        for stride in (8, 16):
            make = functools.partial(
                by_onnxruntime, "TensorrtExecutionProvider", dense(stride), images, **half
            )
            yield f"dense OS{stride}, TensorRT", make
        tuned = functools.partial(torch.compile, mode="max-autotune-no-cudagraphs")  # the graph is ours
        yield "dense OS8, torch.compile", lambda: replaying(tuned(dense(8)), images)
        yield "selective, static, torch.compile", lambda: replaying(tuned(static()), images)


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def calling(network: Callable[[Tensor], Tensor], images: Tensor) -> Run:
    """A run of a network as it is."""
    return lambda: network(images)


def replaying(network: Callable[[Tensor], Tensor], images: Tensor) -> Run:
    """A run that replays a network as one CUDA graph."""
    replay = graphed(lambda given: (network(given),), images)
    return lambda: replay(images)[0]


class _Module(nn.Module):
    """A function of images as PyTorch's exporter takes it."""

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` to logits `[B, K, H, W]`."""
        return self.network(images)


def by_onnxruntime(provider: str, network: Callable[[Tensor], Tensor], images: Tensor, **options: Any) -> Run:
    """A run by an execution provider of onnxruntime, from images to logits on their device.

    Raises:
        MeasurementError: it is not installed, or does not load.
    """
    onnxruntime, given, found = (
        check_runtime("onnxruntime"),
        images.contiguous(),
        network(images).contiguous(),
    )
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 4  # what does not load is told below
    graph = traced(_Module(network), (given,), ["images"], ["logits"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = onnxruntime.InferenceSession(graph, session_options, [(provider, options)])
    if provider not in session.get_providers():
        raise MeasurementError(f"onnxruntime cannot load {provider} here")
    bound, logits = session.io_binding(), session.get_outputs()[0].name
    for bind, name, one in (bound.bind_input, "images", given), (bound.bind_output, logits, found):
        dtype = np.dtype(str(one.dtype).removeprefix("torch."))
        bind(name, one.device.type, one.device.index or 0, dtype, tuple(one.shape), one.data_ptr())

    def run() -> Tensor:
        _ = given  # the binding knows its address alone
        session.run_with_iobinding(bound)
        return found

    return run


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
