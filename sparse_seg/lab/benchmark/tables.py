"""The table of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparse_seg.lab.report.tables import Column, Table

Rows = Sequence[dict[str, Any]]

COLUMNS = (
    Column("scope", "scope"),
    Column("network", "network"),
    Column("form", "form"),
    Column("milliseconds", "ms", "{:.1f}"),
    Column("spread", "±", "{:.1f}"),
    Column("gmacs", "GMACs", "{:.2f}"),
    Column("speedup", "speed-up", "{:.2f}"),
    Column("mac_ratio", "MAC ratio", "{:.2f}"),
    Column("speedup_per_mac_ratio", "speed-up / MAC ratio", "{:.2f}"),
    Column("peak_mib", "peak MiB", "{:.0f}"),
)


def benchmark_table(rows: Rows) -> Table:
    """One line per way to run: median and half the quartile distance, ratios over the first of its scope."""
    return Table(COLUMNS, rows)
