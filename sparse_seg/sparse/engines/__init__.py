"""Engines: ways to run a 3x3 convolution over a layout, all sharing one KRSC weight."""

ENGINES = ("auto", "gather", "spconv")


class EngineError(RuntimeError):
    """An engine was asked for that cannot run here; the message, one line, says what to do."""
