"""Dense checkpoints of other code bases to selective networks with the same numbers, and back."""

from sparse_seg.conversion.convert import SOURCES, Conversion, convert, find_source, to_dense, write_dense
from sparse_seg.conversion.converted import Description, is_converted, read_converted, write_converted
from sparse_seg.conversion.reading import read_source
from sparse_seg.conversion.report import report

__all__ = [
    "SOURCES",
    "Conversion",
    "Description",
    "convert",
    "find_source",
    "is_converted",
    "read_converted",
    "read_source",
    "report",
    "to_dense",
    "write_converted",
    "write_dense",
]
