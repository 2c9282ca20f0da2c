"""Self-contained HTML reports: one file, its pictures inside as data URIs, readable without a network.

A page has two kinds of parts: sections of text, tables and pictures, and an explorer to look around in, with
a slider over the fine fraction and a divider in pictures. Without JavaScript all pictures of that stand below
each other, with their numbers.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sparse_seg.files import atomic_write
from sparse_seg.lab.report.overlays import encode_image
from sparse_seg.lab.report.tables import Table

CSS, STYLE, SCRIPT = (
    Path(__file__).with_name(name).read_text() for name in ("page.css", "explorer.css", "explorer.js")
)
PER_ROW = 2  # pictures


@dataclass(frozen=True)
class Picture:
    """An image file's content with its caption and media type."""

    content: bytes
    caption: str = ""
    media_type: str = "image/png"

    def to_html(self) -> str:
        """A `<figure>` with the image inside as a data URI."""
        caption = html.escape(self.caption)
        uri = f"data:{self.media_type};base64,{base64.b64encode(self.content).decode()}"
        below = f"<figcaption>{caption}</figcaption>" if caption else ""
        return f'<figure><img src="{uri}" alt="{caption}">{below}</figure>'


def photo(image: np.ndarray, caption: str = "") -> Picture:
    """A Picture of `image` [H, W, 3] uint8 RGB as JPEG, several times smaller than PNG for camera images."""
    return Picture(encode_image(image, ".jpg"), caption, "image/jpeg")


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

    def to_html(self) -> str:
        """A `<section>`."""
        parts = [f"<h2>{html.escape(self.heading)}</h2>"]
        parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in self.text.split("\n\n") if paragraph]
        if self.table is not None:
            parts.append(f'<div class="wide">{self.table.to_html(self.links)}</div>')
        if self.pictures:
            columns = min(PER_ROW, len(self.pictures))
            kind = "pictures row" if columns > 1 else "pictures"  # one alone is not blown up to the page
            style = f"grid-template-columns: repeat({columns}, minmax(0, 1fr))"
            parts.append(f'<div class="{kind}" style="{style}">\n{_figures(self.pictures)}\n</div>')
        return "<section>\n" + "\n".join(parts) + "\n</section>"


@dataclass(frozen=True)
class Shot:
    """A frame as one network sees it: its prediction, and the stride of every block unless dense."""

    prediction: Picture
    blocks: Picture | None = None


@dataclass(frozen=True)
class Frame:
    """A frame: pictures that stay, and a `Shot` for each step; the last one stands left of the divider."""

    name: str
    note: str
    still: Sequence[Picture]
    shots: Sequence[Shot]


@dataclass(frozen=True)
class Explorer:
    """A section whose slider goes through `steps`, by rising fine fraction: (name, numbers).

    Links to `#step-N` set it. `start` is the step that is shown first.
    """

    heading: str
    text: str
    steps: Sequence[tuple[str, str]]
    frames: Sequence[Frame]
    start: int = 0

    def to_html(self) -> str:
        """A `<section>`."""
        last = len(self.steps) - 1
        frames = "\n".join(self._frame(number, frame) for number, frame in enumerate(self.frames))
        return f"""<section class="explorer">
<style>{STYLE}</style>
<h2>{html.escape(self.heading)}</h2>
<p>{html.escape(self.text)}</p>
<div class="controls"><label>fine fraction
<input class="fraction" type="range" min="0" max="{last}" step="1" value="{self.start}"></label>
<output>{self._says(self.start)}</output></div>
{frames}
<script>{SCRIPT}</script>
</section>"""

    def _says(self, step: int) -> str:
        return html.escape(": ".join(self.steps[step]))

    def _frame(self, number: int, frame: Frame) -> str:
        steps = "\n".join(self._shot(number, step, shot) for step, shot in enumerate(frame.shots))
        divider = f"divider in {html.escape(frame.name)}"
        return f"""<article id="frame-{number}">
<h3>{html.escape(frame.name)} <small>{html.escape(frame.note)}</small></h3>
<div class="moving">
<div class="reference">{frame.shots[-1].prediction.to_html()}</div>
{steps}
<input class="cut" type="range" min="0" max="100" value="50" aria-label="{divider}">
</div>
<div class="pictures row still">
{_figures(frame.still)}
</div>
</article>"""

    def _shot(self, number: int, step: int, shot: Shot) -> str:
        place = f' id="step-{step}"' if number == 0 else ""
        blocks = f'<div class="blocks">{shot.blocks.to_html()}</div>' if shot.blocks else ""
        return (
            f'<div class="step"{place} data-step="{step}" data-says="{self._says(step)}">'
            f'<div class="prediction">{shot.prediction.to_html()}</div>{blocks}'
            f'<p class="says">{self._says(step)}</p></div>'
        )


def _figures(pictures: Sequence[Picture]) -> str:
    return "\n".join(picture.to_html() for picture in pictures)


def write_report(path: str | Path, title: str, parts: Sequence[Section | Explorer]) -> None:
    """Write the parts as one HTML page to `path`, atomically. Raises OSError if it cannot be written."""
    atomic_write(path, page(title, parts))


def page(title: str, parts: Sequence[Section | Explorer]) -> str:
    """The whole HTML page as text."""
    heading = html.escape(title)
    body = "\n".join(part.to_html() for part in parts)
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
