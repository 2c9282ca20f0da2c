"""One small table in each format, to the letter."""

import csv
import io

from sparse_seg.lab.report.tables import Column, Table, table

TABLE = Table(
    [Column("name", "network"), Column("miou", "mIoU", "{:.1f}"), Column("macs", "GMACs", "{:.2f}")],
    [
        {"name": "dense OS8", "miou": 56.04, "macs": 41.234},
        {"name": "a|b <c>", "miou": float("nan"), "macs": 9, "unshown": 1},
        {"name": None, "miou": 54},
    ],
)


def test_text_and_markdown() -> None:
    assert TABLE.to_text().splitlines() == [
        "network    mIoU  GMACs",
        "─────────  ────  ─────",
        "dense OS8  56.0  41.23",
        "a|b <c>       –   9.00",
        "–          54.0      –",
    ]
    assert TABLE.to_markdown().splitlines() == [
        "| network   | mIoU | GMACs |",
        "| --------- | ---: | ----: |",
        "| dense OS8 | 56.0 | 41.23 |",
        "| a\\|b <c>  |    – |  9.00 |",
        "| –         | 54.0 |     – |",
    ]


def test_csv_keeps_full_precision() -> None:
    assert list(csv.reader(io.StringIO(TABLE.to_csv()))) == [
        ["network", "mIoU", "GMACs"],
        ["dense OS8", "56.04", "41.234"],
        ["a|b <c>", "", "9"],
        ["", "54", ""],
    ]


def test_html_is_escaped_and_marks_numbers() -> None:
    text = TABLE.to_html()
    assert "<td>a|b &lt;c&gt;</td>" in text
    assert '<th class="number">mIoU</th>' in text
    assert '<td class="number">–</td>' in text
    assert text.count("<tr>") == text.count("</tr>") == 4


def test_without_rows() -> None:
    empty = Table([Column("a", "a"), Column("b", "long title")], [])
    assert empty.to_text().splitlines()[0].split() == ["a", "long", "title"]
    assert "<tbody>" in empty.to_html()


def test_a_table_of_runs_has_the_columns_that_are_asked_for_and_there() -> None:
    rows = [{"run": "a", "milliseconds": 3.0}, {"run": "b", "milliseconds": 2.0, "lift": 0.25}]
    assert [column.title for column in table(rows).columns] == ["run", "ms", "lift"]
    assert table(rows, ("milliseconds", "gmacs")).to_csv() == "ms\n3.0\n2.0\n"
