"""Tables of a benchmark and of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparse_seg.lab.benchmark.profile import ORDER
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
    Column("layout_share", "layout %", "{:.1f}"),
)


def benchmark_table(rows: Rows) -> Table:
    """One line per way to run: median and half the quartile distance, ratios over the first of its scope."""
    return Table(COLUMNS, rows)


def profile_table(rows: Rows) -> Table:
    """Milliseconds by part (lines) and kind of work (columns), and the share of the whole."""
    total = sum(row["milliseconds"] for row in rows)
    flat = [row | row["kinds"] | {"share": 100 * row["milliseconds"] / total} for row in rows]
    kinds = {kind: sum(row["kinds"].get(kind, 0.0) for row in rows) for kind in ORDER}
    flat.append({"part": "all", **kinds, "milliseconds": total, "share": 100.0})
    shown = [Column(kind, kind, "{:.1f}") for kind in ORDER if kinds[kind]]
    ends = [Column("milliseconds", "ms", "{:.1f}"), Column("share", "%", "{:.1f}")]
    return Table([Column("part", "part"), *shown, *ends], flat)
