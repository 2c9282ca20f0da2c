"""The page that one looks around in, in a browser: slider, divider, links, phone, no script."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import pytest

from sparse_seg.lab.frames import most_different, numbers
from sparse_seg.lab.report.html import Explorer, Frame, Section, Shot, photo, write_report
from sparse_seg.lab.report.tables import Column, Table
from tests.reporting.test_html import Outline

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt-get install chromium)")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"),
    *("--virtual-time-budget=3000", "--dump-dom"),
)
STEPS = [("dense OS16", "mIoU 50.00 %"), ("f=0.1", "mIoU 55.00 %"), ("dense OS8", "mIoU 60.00 %")]
PROBE = """<script>addEventListener("load", async () => {
const one = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const styleOf = (element) => getComputedStyle(element);
const wait = () => new Promise((done) => setTimeout(done, 100));
const shown = () => all("article:first-of-type .step").filter((step) => styleOf(step).display != "none");
const set = (input, value) => { input.value = value; input.dispatchEvent(new Event("input")); };
const state = () => [one("output").textContent, shown().map((step) => step.dataset.step).join()];
const said = {}; %s
top.postMessage(JSON.stringify(said), "*");
})</script></body>"""
SCREEN = """<title></title>
<script>addEventListener("message", (event) => { document.title = event.data; })</script>
<iframe src="probed.html" style="width: %spx; height: 900px; border: 0"></iframe>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def picture(grey: int, caption: str):
        return photo(np.full((90, 160, 3), grey, np.uint8), caption)

    shots = [
        Shot(picture(40 * step, f"<{step}>"), picture(9, "blocks") if step == 1 else None)
        for step in range(3)
    ]
    frames = [Frame(f"frame {number}", "3.0 % differ", [picture(200, "input")], shots) for number in range(2)]
    table = Table([Column("network", "network")], [{"network": name} for name, _ in STEPS])
    sections = [Section("Table", table=table, links={0: "#step-0", 2: "#step-2"})]
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, "Report", [*sections, Explorer("Look", "around", STEPS, frames, 1)])
    return path


def asked(page: Path, folder: Path, script: str, width: int = 1200) -> dict[str, Any]:
    """What a script puts into `said`, in the page in a browser, on a screen so many px wide."""
    (folder / "probed.html").write_text(page.read_text().replace("</body>", PROBE % script))
    screen = folder / "screen.html"
    screen.write_text(SCREEN % width)  # a window of its own has no less than 500 px
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'browser'}", screen.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return json.loads(html.unescape(done.stdout.partition("<title>")[2].partition("</title>")[0]))


def test_the_page_is_whole_without_a_script(page: Path) -> None:
    outline = Outline(page.read_text())
    assert outline.open == []
    for name, value in STEPS:
        assert page.read_text().count(f'<p class="says">{name}: {value}</p>') == 2
    links = [attributes["href"] for tag, attributes in outline.tags if tag == "a"]
    places = {attributes.get("id") for _, attributes in outline.tags}
    assert links == ["#step-0", "#step-2"]
    assert {str(link)[1:] for link in links} <= places


BOXES = """const parts = all("article:first-of-type :is(.reference img, .step.on .prediction img)");
    said.boxes = parts.map((part) => part.getBoundingClientRect());
    said.wide = document.documentElement.scrollWidth;"""


def check_boxes(said: dict[str, Any], width: int) -> None:
    """Pictures lie on each other, and nothing sticks out."""
    assert len(said["boxes"]) == 2
    assert said["boxes"][0] == said["boxes"][1]
    assert said["wide"] <= width


@needs_browser
def test_slider_and_links_move_numbers_and_pictures_and_the_divider_cuts_one_frame(
    page: Path, tmp_path: Path
) -> None:
    said = asked(
        page,
        tmp_path,
        BOXES
        + """
        said.first = state();
        set(one(".fraction"), 2);
        said.slid = state();
        said.aria = one(".fraction").getAttribute("aria-valuetext");
        one("td a").click();
        await wait();
        said.linked = [...state(), location.hash];
        const clips = () => all(".step.on .prediction img").map((image) => styleOf(image).clipPath);
        said.clips = clips();
        set(one(".cut"), 0);
        said.cut = clips();
        said.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
        """,
    )
    assert said["first"] == ["f=0.1: mIoU 55.00 %", "1"]
    assert said["slid"] == ["dense OS8: mIoU 60.00 %", "2"]
    assert said["aria"] == said["slid"][0]
    assert said["linked"] == ["dense OS16: mIoU 50.00 %", "0", "#step-0"]
    assert all("50%" in clip for clip in said["clips"])
    assert ["50%" in clip for clip in said["cut"]] == [False, True], "of two frames"
    assert [url for url in said["requests"] if not url.startswith("data:")] == []
    check_boxes(said, 1200)


@needs_browser
def test_pictures_fit_a_phone(page: Path, tmp_path: Path) -> None:
    check_boxes(asked(page, tmp_path, BOXES, 390), 390)


@needs_browser
def test_without_a_script_all_is_shown(page: Path, tmp_path: Path) -> None:
    silent = tmp_path / "silent.html"
    silent.write_text(re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL))
    heights = 'all(".step .prediction img").map((image) => image.getBoundingClientRect().height)'
    said = asked(silent, tmp_path, f'said.heights = {heights}; said.bar = styleOf(one(".controls")).display')
    assert len(said["heights"]) == 2 * len(STEPS)
    assert min(said["heights"]) > 50
    assert said["bar"] == "none"


def test_frames_differ_most_and_are_no_neighbours() -> None:
    """Of 24 frames; two networks differ on as many pixels as the frame's value says, most in frame 11."""
    label, order = np.zeros((10, 10), np.uint8), np.arange(100).reshape(10, 10)
    frames: Any = Namespace(load=lambda index: (np.full((10, 10, 3), 50 - abs(2 * index - 22)), label))
    right: Any = Namespace(classes=lambda image, label: (label, None))
    differs: Any = Namespace(classes=lambda image, label: (order < image[0, 0, 0], None))
    chosen = most_different((right, differs), frames, 24)
    assert chosen == [(0.5, 11), (0.44, 8), (0.44, 14), (0.38, 5)], "no other within two of one"


def test_numbers_tell_the_lift() -> None:
    coarse, fine = ({"miou": m, "gmacs": 1.0, "milliseconds": t} for m, t in ((50.0, 10.0), (60.0, 20.0)))
    row = {"miou": 58.0, "gmacs": 0.5, "milliseconds": 13.0}
    assert numbers(row, coarse, fine) == "mIoU 58.00 %, 0.50 GMACs, 13.0 ms, lift +0.50"
    assert numbers(fine, coarse, fine) == "mIoU 60.00 %, 1.00 GMACs, 20.0 ms"
    assert numbers(row | {"milliseconds": None}, coarse, fine) == "mIoU 58.00 %, 0.50 GMACs"
