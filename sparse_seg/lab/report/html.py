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

CSS = """
:root { color-scheme: light; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1.5rem; background: #fff; color: #222;
       font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; padding-bottom: 0.25rem; border-bottom: 1px solid #ddd; }
p { max-width: 48rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; margin: 1rem 0; }
th, td { padding: 0.35rem 0.9rem; text-align: left; border-bottom: 1px solid #e6e6e6; }
th { border-bottom: 2px solid #999; vertical-align: bottom; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { white-space: normal; }
tr { background: #fff; }
tbody tr:nth-child(even) { background: #f7f8fa; }
th:first-child, td:first-child { position: sticky; left: 0; background: inherit; }
.pictures { display: grid; gap: 1rem; margin: 1rem 0; align-items: start; }
figure { margin: 0; min-width: 0; }
img { max-width: min(100%, 48rem); height: auto; display: block; }
.row img { width: 100%; max-width: none; }
@media (max-width: 40rem) { .pictures { grid-template-columns: 1fr !important; } body { padding: 0 0.75rem; }
  table { font-size: 0.8rem; } th, td { padding: 0.35rem 0.3rem; } }
figcaption { font-size: 0.85rem; color: #555; margin-top: 0.3rem; }
"""


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


class Part(Protocol):
    """A part of a page."""

    def to_html(self) -> str: ...


def write_report(path: str | Path, title: str, sections: Sequence[Part]) -> None:
    """Write the sections as one HTML page to `path`, atomically. Raises OSError if it cannot be written."""
    atomic_write(path, page(title, sections))


def page(title: str, sections: Sequence[Part]) -> str:
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
