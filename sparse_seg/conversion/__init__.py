"""Dense checkpoints of other code bases to selective networks with the same numbers, and back."""

from sparse_seg.conversion.back import to_dense, write_dense
from sparse_seg.conversion.forward import Conversion, convert
from sparse_seg.conversion.reading import read_source
from sparse_seg.conversion.sources import SOURCES, find_source

__all__ = ["SOURCES", "Conversion", "convert", "find_source", "read_source", "to_dense", "write_dense"]
