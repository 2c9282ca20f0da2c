"""Self-contained HTML reports: one file, its pictures inside as data URIs, readable without a network."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from sparse_seg.files import atomic_write
from sparse_seg.lab.report.overlays import encode_image
from sparse_seg.lab.report.tables import Table

CSS = Path(__file__).with_name("page.css").read_text()


@dataclass(frozen=True)
class Picture:
    """An image file's content with its media type ("image/png") and caption."""

    content: bytes
    media_type: str
    caption: str = ""

    def to_html(self) -> str:
        """A `<figure>` with the image inside as a data URI."""
        caption = html.escape(self.caption)
        uri = f"data:{self.media_type};base64,{base64.b64encode(self.content).decode()}"
        below = f"<figcaption>{caption}</figcaption>" if caption else ""
        return f'<figure><img src="{uri}" alt="{caption}">{below}</figure>'


def photo(image: np.ndarray, caption: str = "") -> Picture:
    """A Picture of `image` [H, W, 3] uint8 RGB as JPEG, several times smaller than PNG for camera images."""
    return Picture(encode_image(image, ".jpg"), "image/jpeg", caption)


def plot(png: bytes, caption: str = "") -> Picture:
    """A Picture of a PNG file's content, such as `plots.cost_curve` returns."""
    return Picture(png, "image/png", caption)


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in this order. Blank lines in `text` part paragraphs.

    `links` are places in the page by row of the table.
    """

    heading: str
    text: str = ""
    table: Table | None = None
    links: Mapping[int, str] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    pictures_per_row: int = 3

    def to_html(self) -> str:
        """A `<section>`."""
        parts = [f"<h2>{html.escape(self.heading)}</h2>"]
        parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in self.text.split("\n\n") if paragraph]
        if self.table is not None:
            parts.append(f'<div class="wide">{self.table.to_html(self.links)}</div>')
        if self.pictures:
            parts.append(self._pictures())
        return "<section>\n" + "\n".join(parts) + "\n</section>"

    def _pictures(self) -> str:
        columns = min(self.pictures_per_row, len(self.pictures))
        kind = "pictures row" if columns > 1 else "pictures"  # a single picture is not blown up to the page
        figures = "\n".join(picture.to_html() for picture in self.pictures)
        style = f"grid-template-columns: repeat({columns}, minmax(0, 1fr))"
        return f'<div class="{kind}" style="{style}">\n{figures}\n</div>'


class PagePart(Protocol):
    """A part of a page."""

    def to_html(self) -> str: ...


def write_report(path: str | Path, title: str, sections: Sequence[PagePart]) -> None:
    """Write the sections as one HTML page to `path`, atomically. Raises OSError if it cannot be written."""
    atomic_write(path, page(title, sections))


def page(title: str, sections: Sequence[PagePart]) -> str:
    """The whole HTML page as text."""
    heading = html.escape(title)
    body = "\n".join(section.to_html() for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{heading}</h1>
{body}
</body>
</html>
"""
