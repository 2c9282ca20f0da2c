"""Reports: one file without references to others, text escaped; tables to the letter; cost curves."""

import base64
import csv
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sparse_seg.errors import SparseSegError
from sparse_seg.lab.report import plots
from sparse_seg.lab.report.html import Picture, Section, page, photo, write_report
from sparse_seg.lab.report.plots import COLOURS, cost_curve
from sparse_seg.lab.report.tables import Column, Table, table

IMAGE = np.full((9, 13, 3), (200, 40, 40), np.uint8)
PNG = b"\x89PNG stand-in"
SECTIONS = [
    Section("Text & <b>", "one <script>\n\ntwo"),
    Section("Table", table=Table([Column("a", "a")], [{"a": "<i>"}])),
    Section("Pictures", pictures=[photo(IMAGE, 'a "quoted" <caption>'), Picture(PNG)]),
]


class Outline(HTMLParser):
    """Tags with their attributes, and whether every tag is closed in order."""

    VOID = ("meta", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_report_refers_to_no_other_file(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", "Title", SECTIONS)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    outline = Outline(text)
    assert not outline.open
    sources = [attributes["src"] for _, attributes in outline.tags if "src" in attributes]
    assert len(sources) == 2
    assert all(source and source.startswith("data:image/") for source in sources)
    assert not any("href" in attributes for _, attributes in outline.tags)
    assert not re.search(r"https?:|url\(|@import", text)


def test_pictures_are_inside() -> None:
    first, second = (attributes["src"] or "" for attributes in Outline(page("", SECTIONS)).attributes("img"))
    kind, content = first.split(",")
    assert kind == "data:image/jpeg;base64"
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(content), np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    np.testing.assert_allclose(decoded[..., ::-1], IMAGE.astype(float), atol=4)
    assert second == "data:image/png;base64," + base64.b64encode(PNG).decode()


def test_text_is_escaped() -> None:
    text = page("a < b", SECTIONS)
    outline = Outline(text)
    assert "<title>a &lt; b</title>" in text
    assert "<h1>a &lt; b</h1>" in text
    assert "<h2>Text &amp; &lt;b&gt;</h2>" in text
    assert "<p>one &lt;script&gt;</p>\n<p>two</p>" in text
    assert outline.attributes("img")[0]["alt"] == 'a "quoted" <caption>'
    assert not {"script", "b", "i", "caption"} & {tag for tag, _ in outline.tags}


# -- tables


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


# -- curves


SERIES = {"linear": [(2.0, 0.55), (1.0, 0.54)], "none": [(1.0, 0.54), (2.0, 0.50)]}
POINTS = {"dense OS8": (4.0, 0.56), "dense OS16": (1.0, 0.54)}


def test_png_shows_each_series() -> None:
    content = cost_curve(SERIES, "GMACs", "mIoU", POINTS)
    picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None
    for colour in COLOURS[: len(SERIES)]:
        bgr = [int(colour[i : i + 2], 16) for i in (5, 3, 1)]
        assert np.equal(picture, bgr).all(axis=2).sum() > 100


def test_everything_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    text = pytest.importorskip("matplotlib.text").Text
    figures = list[Any]()
    monkeypatch.setattr(plots, "picture", figures.append)
    cost_curve(SERIES, "GMACs", "mIoU", POINTS)
    assert {*SERIES, *POINTS, "GMACs", "mIoU"} <= {one.get_text() for one in figures[0].findobj(text)}


def test_missing_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SparseSegError, match=r"pip install 'sparse_seg\[plots\]'"):
        cost_curve(SERIES, "x", "y", POINTS)
