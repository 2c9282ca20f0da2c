"""Dense checkpoints of other code bases to selective networks with the same numbers, and back."""

from sparse_seg.conversion.convert import Conversion, convert, convert_module
from sparse_seg.conversion.mapping import to_dense, write_dense
from sparse_seg.conversion.reading import read_source
from sparse_seg.conversion.sources import SOURCES, find_source

__all__ = [
    "SOURCES",
    "Conversion",
    "convert",
    "convert_module",
    "find_source",
    "read_source",
    "to_dense",
    "write_dense",
]
