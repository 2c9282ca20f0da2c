"""A network in onnxruntime or OpenVINO, with the model's own interface for prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_seg.export.cache import GraphCache
from sparse_seg.export.check import check_run, plain_copy
from sparse_seg.export.onnx_file import to_onnx
from sparse_seg.export.options import ExportOptions
from sparse_seg.export.runtime import check_runtime, open_session
from sparse_seg.export.segmentor import RuntimeSegmentor, Session
from sparse_seg.run.network import SelectiveNetwork


class OnnxSegmentor(RuntimeSegmentor):
    """A network in onnxruntime or OpenVINO; its graphs are kept on disk, too (see `cache`).

    Raises:
        SparseSegError: an unknown runtime, or one that is not installed.
    """

    def __init__(
        self, model: SelectiveNetwork, runtime: str, threads: int | None = None, most: int | None = None
    ) -> None:
        check_runtime(runtime)
        super().__init__(model, most)
        self.runtime, self.threads = runtime, threads or torch.get_num_threads()
        self.cache = GraphCache(model, runtime)
        self.folder = self.cache.folder

    def _read(self, options: ExportOptions) -> Session | None:
        graph = self.cache.read(options)
        return None if graph is None else self._opened(graph)

    def _make(self, options: ExportOptions, inputs: dict[str, Tensor]) -> Session:
        graph = to_onnx(self._static(options)).SerializeToString()
        session = self._opened(graph)
        on_cpu = {name: value.cpu() for name, value in session(**inputs).items()}
        check_run(plain_copy(self.model), options, inputs["images"].cpu(), on_cpu)
        self.cache.write(options, graph)
        return session

    def _opened(self, graph: bytes) -> Session:
        device = self.model.device
        run = open_session(graph, self.runtime, self.threads, device)

        def session(**inputs: Tensor) -> dict[str, Tensor]:
            arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in inputs.items()}
            return {name: torch.from_numpy(value).to(device) for name, value in run(**arrays).items()}

        return session
