"""Engines: ways to run a 3x3 convolution over a layout, all sharing one KRSC weight."""

from sparse_seg.errors import SparseSegError

ENGINES = ("auto", "gather", "spconv")


class EngineError(SparseSegError):
    """An engine was asked for that cannot run here; the message, one line, says what to do."""
