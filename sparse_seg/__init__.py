"""Semantic segmentation that pays for detail only where detail is."""

from sparse_seg.checkpoint import load_model
from sparse_seg.lab.predict.segment import Segmentation, segment
from sparse_seg.models.build import build_model
from sparse_seg.version import __version__

__all__ = ["Segmentation", "__version__", "build_model", "load_model", "segment"]
