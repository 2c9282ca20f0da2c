"""A small table that prints as terminal text, Markdown, CSV or HTML."""

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """One column: the rows' `key`, its heading and how a value is written (`str.format`)."""

    key: str
    title: str
    format: str = "{}"

    def cell(self, row: Mapping[str, Any]) -> str:
        """The row's value as text; an en dash where it is absent, None or nan."""
        value = row.get(self.key)
        return MISSING if _is_missing(value) else self.format.format(value)

    def is_numeric(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether every value present is a number: such columns are aligned right."""
        values = [row.get(self.key) for row in rows]
        return all(_is_missing(value) or isinstance(value, Number) for value in values)


@dataclass(frozen=True)
class Table:
    """Columns and rows; a row maps column keys to values, and keys without a column are not shown."""

    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]

    def to_text(self) -> str:
        """Columns aligned by spaces, a rule under the headings; for a terminal."""
        lines = self._padded(self._titles(), self._cells())
        rule = ["─" * len(title) for title in lines[0]]
        return "\n".join("  ".join(line).rstrip() for line in [lines[0], rule, *lines[1:]])

    def to_markdown(self) -> str:
        """A GitHub-flavoured table, padded so that its source is readable too."""
        titles, *rows = [
            [_escape_markdown(cell) for cell in line] for line in [self._titles(), *self._cells()]
        ]
        lines = self._padded(titles, rows)
        rule = [
            "-" * (len(title) - numeric) + ":" * numeric
            for title, numeric in zip(lines[0], self._numeric(), strict=True)
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])

    def to_csv(self) -> str:
        """Values at full precision, for other programs; a missing value is an empty cell."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self._titles())
        for row in self.rows:
            values = [row.get(column.key) for column in self.columns]
            writer.writerow(["" if _is_missing(value) else value for value in values])
        return out.getvalue()

    def to_html(self, links: Mapping[int, str] | None = None) -> str:
        """A `<table>`; cells of numeric columns have the class `number`.

        links: where the first cell of a row leads, by row.
        """
        head = self._html_row("th", self._titles())
        rows = enumerate(self._cells())
        body = "\n".join(self._html_row("td", cells, (links or {}).get(row)) for row, cells in rows)
        return f"<table>\n<thead>\n{head}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>"

    def _titles(self) -> list[str]:
        return [column.title for column in self.columns]

    def _cells(self) -> list[list[str]]:
        return [[column.cell(row) for column in self.columns] for row in self.rows]

    def _numeric(self) -> list[bool]:
        return [column.is_numeric(self.rows) for column in self.columns]

    def _padded(self, titles: list[str], rows: list[list[str]]) -> list[list[str]]:
        lines = [titles, *rows]
        widths = [max(3, *map(len, cells)) for cells in zip(*lines, strict=True)]
        pads = [str.rjust if numeric else str.ljust for numeric in self._numeric()]
        return [
            [pad(cell, width) for pad, cell, width in zip(pads, line, widths, strict=True)] for line in lines
        ]

    def _html_row(self, tag: str, cells: list[str], link: str | None = None) -> str:
        kinds = [' class="number"' if numeric else "" for numeric in self._numeric()]
        inside = [html.escape(cell) for cell in cells]
        if link is not None:
            inside[0] = f'<a href="{html.escape(link)}">{inside[0]}</a>'
        written = [f"<{tag}{k}>{cell}</{tag}>" for k, cell in zip(kinds, inside, strict=True)]
        return f"<tr>{''.join(written)}</tr>"


COLUMNS = {
    column.key: column
    for column in (
        *(Column(key, key) for key in ("scope", "network", "form", "run", "exchange")),
        *(Column("distillation_mark", "distil"), Column("boundary_mark", "detail")),
        *(Column("miou", "mIoU %", "{:.2f}"), Column("miou_std", "±", "{:.2f}")),
        Column("boundary_miou", "boundary mIoU %", "{:.2f}"),
        *(Column("parameters_m", "M params", "{:.2f}"), Column("checkpoint_mb", "MB", "{:.1f}")),
        Column("gmacs", "GMACs", "{:.2f}"),
        *(Column("milliseconds", "ms", "{:.1f}"), Column("spread", "±", "{:.1f}")),
        Column("least", "least", "{:.1f}"),
        *(Column("speedup", "speed-up", "{:.2f}"), Column("mac_ratio", "MAC ratio", "{:.2f}")),
        Column("speedup_per_mac_ratio", "speed-up / MAC ratio", "{:.2f}"),
        *(Column("peak_mib", "peak MiB", "{:.0f}"), Column("step_seconds", "s/step", "{:.2f}")),
        *(Column("parameters_share", "params %", "{:.0f}"), Column("gmacs_share", "GMACs %", "{:.0f}")),
        *(Column("milliseconds_share", "ms %", "{:.0f}"), Column("of_fine", "of dense", "{:.2f}")),
        *(Column(f"{key}_share", f"{key} share", "{:.2f}") for key in ("time", "accuracy")),
        Column("lift", "lift", "{:.2f}"),
    )
}


def table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str] = tuple(COLUMNS)) -> Table:
    """Runs of networks, one line each: the columns of `COLUMNS` that are asked for and that a row has."""
    return Table([COLUMNS[key] for key in keys if not rows or any(key in row for row in rows)], rows)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _escape_markdown(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
