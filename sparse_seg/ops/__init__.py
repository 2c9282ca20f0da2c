"""Operators: one file a family says how each runs on grids and on rows, and what it costs."""

from sparse_seg.ops import channels, convolution, norm, own_code, pointwise, pooling, resizing  # noqa: F401 (enter themselves)
from sparse_seg.ops.base import OPERATORS, Operator, Reads, Spatial, UnknownOperator, Window
from sparse_seg.ops.call import READERS
from sparse_seg.ops.node import Graph, Node

__all__ = [
    "OPERATORS",
    "READERS",
    "Graph",
    "Node",
    "Operator",
    "Reads",
    "Spatial",
    "UnknownOperator",
    "Window",
]
