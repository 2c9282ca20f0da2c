"""Semantic segmentation that pays for detail only where detail is."""

from sparse_seg.checkpoint import load_model, save_model
from sparse_seg.export.runner import in_runtime
from sparse_seg.export.segmentor import RuntimeSegmentor
from sparse_seg.lab.predict.segment import Segmentation, segment
from sparse_seg.run.build import build_model
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.selective import selective
from sparse_seg.version import __version__

__all__ = [
    "RuntimeSegmentor",
    "Segmentation",
    "SelectiveNetwork",
    "__version__",
    "build_model",
    "in_runtime",
    "load_model",
    "save_model",
    "segment",
    "selective",
]
