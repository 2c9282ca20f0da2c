"""Semantic segmentation that pays for detail only where detail is."""

from .models.build import build_model
from .version import __version__

__all__ = ["__version__", "build_model"]
