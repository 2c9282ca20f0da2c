"""Other runtimes on the plain dense network. None is required: one that is missing raises as it is tried."""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.errors import MeasurementError
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


def _onnxruntime(module: nn.Module, given: Tensor) -> Run:
    import onnxruntime

    _needs_cpu(given)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        path.write_bytes(_onnx(module, given))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: given.contiguous().numpy()}
    return lambda: session.run(None, inputs)[0]


def _openvino(module: nn.Module, given: Tensor) -> Run:
    import openvino

    _needs_cpu(given)
    network = openvino.convert_model(io.BytesIO(_onnx(module, given)))
    settings = {
        "INFERENCE_PRECISION_HINT": "f32" if given.dtype == torch.float32 else "f16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.compile_model(network, "CPU", settings).create_infer_request()
    array = given.contiguous().numpy()
    return lambda: request.infer([array], share_inputs=True)[0]


def _onnx(module: nn.Module, given: Tensor) -> bytes:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    buffer = io.BytesIO()
    torch.onnx.export(
        module,
        (given.contiguous(),),
        buffer,  # type: ignore[arg-type]  # the exporter without dynamo takes it
        dynamo=False,
        opset_version=17,
    )
    return buffer.getvalue()


def _needs_cpu(given: Tensor) -> None:
    if given.device.type != "cpu":
        raise MeasurementError("tried on the CPU only")


PEERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "torch.compile": _torch_compile,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
