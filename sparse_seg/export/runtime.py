"""Sessions of onnxruntime and OpenVINO behind one call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparse_seg.errors import SparseSegError, choose_one, import_package

RUNTIMES = ("onnxruntime", "openvino")
INSTALL = "pip install 'sparse_seg[export]'"
_NEEDS = {"onnxruntime": ("InferenceSession", "SessionOptions"), "openvino": ("Core",)}
Session = Callable[..., dict[str, np.ndarray]]


def open_session(
    graph: bytes | str | os.PathLike[str],
    runtime: str,
    threads: int | None = None,
    device: torch.device | str = "cpu",
) -> Session:
    """A function of named arrays that gives the outputs by name; several threads may call it at once.

    Args:
        graph: an ONNX file, or its content.
        threads: of the processor; None leaves it to the runtime.
        device: where to run; onnxruntime takes a GPU if it is built for it, and else the processor, as
            OpenVINO always does.

    Raises:
        SparseSegError: an unknown runtime, or one that is not installed, is broken or does not take the
            graph.
    """
    module = check_runtime(runtime)
    graph = graph if isinstance(graph, bytes) else os.fspath(graph)
    try:
        if runtime == "onnxruntime":
            return _onnxruntime(module, graph, threads, torch.device(device))
        return _openvino(module, graph, threads)
    except Exception as error:  # onnxruntime's errors share no base
        raise SparseSegError(
            f"{runtime} cannot run the graph: {' '.join(str(error).split())[:200]}"
        ) from None


def check_runtime(runtime: str) -> Any:
    """The package of a runtime. Raises a SparseSegError for an unknown one, or one that is not installed or
    broken."""
    if runtime not in RUNTIMES:
        raise SparseSegError(f"unknown runtime {choose_one(runtime, RUNTIMES)}")
    extra = INSTALL if runtime == "onnxruntime" else "pip install openvino"
    return import_package(runtime, f"{runtime} is not installed: {extra}", *_NEEDS[runtime])


def _onnxruntime(onnxruntime: Any, graph: bytes | str, threads: int | None, device: torch.device) -> Session:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        # TF32, its default, keeps three digits of ten
        own = {"device_id": device.index or 0, "use_tf32": 0}
        providers.insert(0, ("CUDAExecutionProvider", own))
    session = onnxruntime.InferenceSession(graph, options, providers=providers)
    names = [output.name for output in session.get_outputs()]
    return lambda **arrays: dict(zip(names, session.run(names, arrays), strict=True))


def _openvino(openvino: Any, graph: bytes | str, threads: int | None) -> Session:
    core = openvino.Core()
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(
        graph if isinstance(graph, str) else core.read_model(graph), "CPU", settings
    )
    names = [output.any_name for output in compiled.outputs]
    idle: list[Any] = []  # requests; one serves one thread at a time

    def run(**arrays: np.ndarray) -> dict[str, np.ndarray]:
        try:
            request = idle.pop()
        except IndexError:
            request = compiled.create_infer_request()
        results = request.infer(arrays)
        outputs = {name: np.array(results[name]) for name in names}
        idle.append(request)  # one that failed is dropped
        return outputs

    return run
