"""Networks on a CUDA device as CUDA graphs: no launches and no waits between the kernels of a run."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_seg.errors import SparseSegError
from sparse_seg.export.check import check_run
from sparse_seg.export.options import ExportOptions
from sparse_seg.export.segmentor import RuntimeSegmentor, Session
from sparse_seg.run.network import SelectiveNetwork

NAME = "cuda-graph"
# Of logits, relative to the largest: half precision's and TF32's; a wrong table gives about 1
ROUNDING = 5e-2


class CudaGraphSegmentor(RuntimeSegmentor):
    """A network whose graphs are its static form as CUDA graphs, in the model's precision.

    Raises:
        SparseSegError: the model is on another device.
    """

    runtime = NAME

    def __init__(self, model: SelectiveNetwork, most: int | None = None) -> None:
        check_device(model.device)
        super().__init__(model, most)
        self.dtype = next(model.parameters()).dtype

    def _make(self, options: ExportOptions, inputs: dict[str, Tensor]) -> Session:
        network = self._static(dataclasses.replace(options, ghosts=False, tiles=False))
        names = network.interface()[1]
        network.to(self.model.device, self.dtype)
        with torch.autocast("cuda", enabled=False):
            run = graphed(network, *inputs.values())

        def session(**given: Tensor) -> dict[str, Tensor]:
            return dict(zip(names, run(*given.values()), strict=True))

        check_run(self.model, options, inputs["images"], session(**inputs), ROUNDING)
        return session


def check_device(device: torch.device) -> None:
    """Raises a SparseSegError where there are no CUDA graphs."""
    if device.type != "cuda":
        raise SparseSegError(f"{NAME} needs a model on a CUDA device; this one is on the {device.type}")


def graphed(module: Callable[..., tuple[Tensor, ...]], *example: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """A function of tensors like the example that replays a module as one CUDA graph ("CUDA Graphs" in
    PyTorch's notes on CUDA semantics).

    Each call takes its inputs on the device and gives tensors of its own; several threads take turns.

    Args:
        module: without gradients, with shapes that do not depend on its inputs' values.
        example: on the device; of the inputs' shapes and dtypes.
    """
    inputs, side, turn = [value.clone() for value in example], torch.cuda.Stream(), threading.Lock()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(side):
        for _ in range(3):  # algorithms are chosen, code is compiled
            module(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        outputs = module(*inputs)

    def replay(*given: Tensor) -> tuple[Tensor, ...]:
        _ = module  # its weights, which the graph reads, live on
        with turn, torch.inference_mode():
            for kept, value in zip(inputs, given, strict=True):
                kept.copy_(value)
            graph.replay()
            return tuple(value.clone() for value in outputs)

    return replay
