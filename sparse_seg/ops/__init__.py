"""Operators: one file a family says how each runs on grids and on rows, and what it costs."""

from sparse_seg.ops import channels, convolution, norm, own_code, pointwise, pooling, resizing  # noqa: F401 (enter themselves)
from sparse_seg.ops.base import (
    OPERATORS,
    READERS,
    Operator,
    Pads,
    Pair,
    Reads,
    Spatial,
    Tensors,
    UnknownOperator,
    Window,
)
from sparse_seg.ops.node import Graph, Node

__all__ = [
    "OPERATORS",
    "READERS",
    "Graph",
    "Node",
    "Operator",
    "Pads",
    "Pair",
    "Reads",
    "Spatial",
    "Tensors",
    "UnknownOperator",
    "Window",
]
