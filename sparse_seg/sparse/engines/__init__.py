"""Engines: ways to run a 3x3 convolution over a layout, all sharing one KRSC weight."""

from sparse_seg.sites import ENGINES, EngineError

__all__ = ["ENGINES", "EngineError"]
