"""Other runtimes on the plain dense network. None is required: one that is missing raises as it is tried."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from sparse_seg.errors import MeasurementError
from sparse_seg.export.runtime import RUNTIMES, open_session
from sparse_seg.lab.latency import Run

TOLERANCE = 1e-2  # largest difference over largest value: a peer that computes something else is no peer


def peer_run(name: str, module: nn.Module, given: Tensor) -> Run:
    """A run of `module(given)` by a peer, compiled beforehand and checked.

    Raises:
        MeasurementError: it computes other numbers, or not on this device.
        Exception: whatever the peer raises where it is missing or fails.
    """
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        expected, run = module(given), PEERS[name](module, given)
        found = torch.as_tensor(run()).to(expected)
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error < TOLERANCE:
        raise MeasurementError(f"{name} computes other numbers (relative error {error:.1g})")
    return run


def _torch_compile(module: nn.Module, given: Tensor) -> Run:
    compiled = torch.compile(module)
    return torch.inference_mode()(lambda: compiled(given))


def _exported(runtime: str, module: nn.Module, given: Tensor) -> Run:
    if given.device.type != "cpu":
        raise MeasurementError("tried on the CPU only")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    given, graph = given.contiguous(), io.BytesIO()
    options = {"input_names": ["images"], "dynamo": False, "opset_version": 17}
    torch.onnx.export(module, (given,), graph, **options)  # type: ignore[arg-type]  # without dynamo it can
    session, images = open_session(graph.getvalue(), runtime, torch.get_num_threads()), given.numpy()
    return lambda: next(iter(session(images=images).values()))


PEERS: dict[str, Callable[[nn.Module, Tensor], Run]] = {
    "torch.compile": _torch_compile,
    **{runtime: partial(_exported, runtime) for runtime in RUNTIMES},
}
