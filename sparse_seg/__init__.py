"""Semantic segmentation that pays for detail only where detail is."""

from sparse_seg.checkpoint import load_model
from sparse_seg.models.build import build_model
from sparse_seg.version import __version__

__all__ = ["__version__", "build_model", "load_model"]
