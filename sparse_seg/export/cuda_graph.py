"""Networks on a CUDA device as CUDA graphs: no launches and no waits between the kernels of a run."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_seg.errors import SparseSegError, first_line, out_of_memory
from sparse_seg.export.check import check_run
from sparse_seg.export.options import ExportOptions
from sparse_seg.export.segmentor import RuntimeSegmentor, Session
from sparse_seg.run.network import SelectiveNetwork

NAME = "cuda-graph"
# Of logits, relative to the largest: half precision's and TF32's; a wrong table gives about 1
ROUNDING = 5e-2
BFLOAT16_ROUNDING = 1e-1  # random weights gave 6e-2


class _Reading(TorchDispatchMode):
    """Notes the tensors that a run reads and has not made: caches may drop what a graph goes on reading."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[int, Tensor] = {}
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs)):
            if isinstance(one, Tensor) and id(one) not in self.made:
                self.read[id(one)] = one
        self.made |= {id(one): one for one in tree_leaves(out) if isinstance(one, Tensor)}
        return out


class CudaGraphSegmentor(RuntimeSegmentor):
    """A network whose graphs are its static form as CUDA graphs, in the model's precision.

    Raises:
        SparseSegError: the model is on another device; later, a network that cannot be captured.
    """

    runtime = NAME

    def __init__(self, model: SelectiveNetwork, most: int | None = None) -> None:
        check_device(model.device)
        super().__init__(model, most)
        floating = (one.dtype for one in model.tensors.values() if one.is_floating_point())
        self.dtype = next(floating, torch.float32)

    def _make(self, options: ExportOptions, inputs: dict[str, Tensor]) -> Session:
        network = self._static(dataclasses.replace(options, ghosts=False, tiles=False))
        names = network.interface()[1]
        network.to(self.model.device, self.dtype)
        try:
            with torch.autocast("cuda", enabled=False):
                run = graphed(network, *inputs.values())
        except Exception as error:  # whatever CUDA and a network's own code raise
            if out_of_memory(error):
                raise
            raise SparseSegError(f"{NAME} cannot capture this network: {first_line(error)}") from error

        def session(**given: Tensor) -> dict[str, Tensor]:
            return dict(zip(names, run(*given.values()), strict=True))

        rounding = BFLOAT16_ROUNDING if self.dtype == torch.bfloat16 else ROUNDING
        check_run(self.model, options, inputs["images"], session(**inputs), rounding)
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
    device = example[0].device
    inputs, turn, done = [value.clone() for value in example], threading.Lock(), torch.cuda.Event()
    with torch.cuda.device(device), torch.inference_mode():
        side, reading = torch.cuda.Stream(), _Reading()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # algorithms are chosen, code is compiled
                module(*inputs)
            with reading:
                module(*inputs)
            reading.made.clear()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # other threads may run meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = module(*inputs)

    def replay(*given: Tensor) -> tuple[Tensor, ...]:
        _ = module, reading.read  # what the graph reads lives on
        with turn, torch.cuda.device(device), torch.inference_mode():
            done.wait()  # for another thread's stream
            for kept, value in zip(inputs, given, strict=True):
                kept.copy_(value)
            graph.replay()
            with torch.inference_mode(False):
                made = tuple(value.clone() for value in outputs)
            done.record()
            return made

    return replay
