"""The selective network as one branch-free graph of stock operators, for any runtime."""

from sparse_seg.export.onnx_file import export_onnx, to_onnx
from sparse_seg.export.options import ExportOptions
from sparse_seg.export.runner import Runner, in_runtime
from sparse_seg.export.runtime import open_session
from sparse_seg.export.segmentor import RuntimeSegmentor
from sparse_seg.export.static import StaticNetwork

__all__ = [
    "ExportOptions",
    "Runner",
    "RuntimeSegmentor",
    "StaticNetwork",
    "export_onnx",
    "in_runtime",
    "open_session",
    "to_onnx",
]
