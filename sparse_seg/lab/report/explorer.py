"""A part of an HTML report that one looks around in: a slider over the fine fraction, a divider in pictures.

Without JavaScript all its pictures stand below each other, with their numbers.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_seg.lab.report.html import Picture


@dataclass(frozen=True)
class Shot:
    """A frame as one network sees it: its prediction, and the stride of every block unless dense."""

    prediction: Picture
    blocks: Picture | None = None


@dataclass(frozen=True)
class Frame:
    """A frame: pictures that stay, the prediction left of the divider, and a `Shot` for each step."""

    name: str
    note: str
    still: Sequence[Picture]
    reference: Picture
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
        still = "\n".join(picture.to_html() for picture in frame.still)
        steps = "\n".join(self._shot(number, step, shot) for step, shot in enumerate(frame.shots))
        divider = f"divider in {html.escape(frame.name)}"
        return f"""<article id="frame-{number}">
<h3>{html.escape(frame.name)} <small>{html.escape(frame.note)}</small></h3>
<div class="moving">
<div class="reference">{frame.reference.to_html()}</div>
{steps}
<input class="cut" type="range" min="0" max="100" value="50" aria-label="{divider}">
</div>
<div class="pictures row still">
{still}
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


STYLE, SCRIPT = ((Path(__file__).parent / f"explorer.{kind}").read_text() for kind in ("css", "js"))
