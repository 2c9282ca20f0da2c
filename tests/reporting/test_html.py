"""Reports: one file without references to others, text escaped, written whole or not at all."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np

from sparse_seg.lab.report.html import Picture, Section, page, photo, write_report
from sparse_seg.lab.report.tables import Column, Table

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
