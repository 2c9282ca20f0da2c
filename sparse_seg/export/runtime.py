"""Sessions of onnxruntime and OpenVINO behind one call, and a model's interface on top of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_seg.errors import SparseSegError
from sparse_seg.export.network import ExportOptions, StaticNetwork
from sparse_seg.export.onnx_file import INSTALL, to_onnx
from sparse_seg.models.segmentor import SelectiveSegmentor

RUNTIMES = ("onnxruntime", "openvino")
Session = Callable[..., dict[str, np.ndarray]]


def open_session(graph: bytes | str | os.PathLike[str], runtime: str, threads: int | None = None) -> Session:
    """A function of named arrays that gives the outputs by name.

    Args:
        graph: an ONNX file, or its content.
        threads: of the processor; None leaves it to the runtime.

    Raises:
        SparseSegError: an unknown runtime, or one that is not installed.
    """
    if runtime not in RUNTIMES:
        raise SparseSegError(f"unknown runtime {runtime!r}; choose one of {', '.join(RUNTIMES)}")
    graph = graph if isinstance(graph, bytes) else os.fspath(graph)
    try:
        return _onnxruntime(graph, threads) if runtime == "onnxruntime" else _openvino(graph, threads)
    except ImportError:
        extra = INSTALL if runtime == "onnxruntime" else "pip install openvino"
        raise SparseSegError(f"{runtime} is not installed: {extra}") from None


def _onnxruntime(graph: bytes | str, threads: int | None) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    providers = [
        name
        for name in ("CUDAExecutionProvider", "CPUExecutionProvider")
        if name in onnxruntime.get_available_providers()
    ]
    session = onnxruntime.InferenceSession(graph, options, providers=providers)
    names = [output.name for output in session.get_outputs()]
    return lambda **arrays: dict(zip(names, session.run(names, arrays), strict=True))


def _openvino(graph: bytes | str, threads: int | None) -> Session:
    import openvino

    core = openvino.Core()
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(
        graph if isinstance(graph, str) else core.read_model(graph), "CPU", settings
    )
    request = compiled.create_infer_request()
    names = [output.any_name for output in compiled.outputs]

    def run(**arrays: np.ndarray) -> dict[str, np.ndarray]:
        results = request.infer(arrays)
        return {name: np.array(results[name]) for name in names}

    return run


class RuntimeSegmentor:
    """A model in a runtime, for images of one size: the interface of `SelectiveSegmentor` for prediction.

    Graphs are made when they are first needed: one for the model's policy, one for masks that are given for
    each number of fine blocks, and one for each dense output stride.

    Args:
        model: in eval mode; its weights are copied.
        runtime: `onnxruntime` or `openvino`.
        size: `(H, W)` of the images, px.
        batch, merge: see `ExportOptions`.
        threads: see `open_session`.

    Raises:
        SparseSegError: what cannot be exported, or a runtime that is not installed.
    """

    def __init__(
        self,
        model: SelectiveSegmentor,
        runtime: str,
        size: tuple[int, int],
        batch: int = 1,
        merge: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.model, self.runtime, self.threads = model, runtime, threads
        self.size, self.batch, self.merge = tuple(size), batch, merge
        self.strides, self.policy, self.training = model.strides, model.policy, False
        self._sessions: dict[tuple[Any, ...], Session] = {}
        self._session(False, None, None)  # what cannot be exported is refused here

    def __call__(self, images: Tensor, fine_blocks: Tensor | None = None) -> Tensor:
        """Logits `[B, K, H, W]` of normalised images; see `SelectiveSegmentor.forward`."""
        return self._run(images, True, None, fine_blocks)["logits"]

    forward = __call__

    def dense(self, images: Tensor, output_stride: int = 8) -> Tensor:
        """Logits `[B, K, H, W]` of the same weights run dense."""
        return self._run(images, True, output_stride, None)["logits"]

    def classify(
        self, images: Tensor, output_stride: int | None = None, fine_blocks: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Classes int64 `[B, H, W]`, and the fine blocks (None when dense)."""
        outputs = self._run(images, False, output_stride, fine_blocks)
        return outputs["classes"].long(), outputs.get("fine_blocks")

    def eval(self) -> RuntimeSegmentor:
        return self

    def _run(
        self, images: Tensor, logits: bool, dense: int | None, fine_blocks: Tensor | None
    ) -> dict[str, Tensor]:
        expected = (self.batch, 3, *self.size)
        if tuple(images.shape) != expected or images.dtype != torch.float32:
            raise ValueError(
                f"this network was made for float32 images {list(expected)}, not {images.dtype} "
                f"{list(images.shape)}"
            )
        arrays, count = {"images": images.detach().cpu().numpy()}, None
        if dense is None and fine_blocks is not None:
            if fine_blocks.dtype != torch.bool:
                raise ValueError("in a runtime fine_blocks must be bool; levels need the model itself")
            counts = fine_blocks.flatten(1).sum(1)
            count = int(counts[0])
            if bool((counts != count).any()):
                raise ValueError("in a runtime all images of a batch need the same number of fine blocks")
            if count == 0:
                dense = self.strides[-1]
            else:
                numbers = fine_blocks.flatten(1).nonzero()[:, 1].reshape(self.batch, count)
                arrays["blocks"] = numbers.cpu().numpy()
        outputs = self._session(logits, dense, None if dense else count)(**arrays)
        return {name: torch.from_numpy(value) for name, value in outputs.items()}

    def _session(self, logits: bool, dense: int | None, count: int | None) -> Session:
        key = logits, dense, count
        if key not in self._sessions:
            fraction = None
            if count is not None:
                coarsest = self.strides[-1]
                fraction = count / (-(-self.size[0] // coarsest) * -(-self.size[1] // coarsest))
            options = ExportOptions(
                (self.size[0], self.size[1]),
                self.batch,
                dense,
                fraction,
                given=count is not None,
                merge=self.merge,
                mean=(0, 0, 0),  # images come normalised
                std=(1, 1, 1),
                logits=logits,
            )
            graph = to_onnx(StaticNetwork(self.model, options))
            self._sessions[key] = open_session(graph.SerializeToString(), self.runtime, self.threads)
        return self._sessions[key]
