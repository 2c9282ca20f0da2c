"""The page that one looks around in, in a browser: slider, divider, links, keyboard, phone, no script."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sparse_seg.data.dataset import SegmentationDataset
from sparse_seg.lab.frames import most_different, numbers
from sparse_seg.lab.report.explorer import Explorer, Frame, Shot
from sparse_seg.lab.report.html import Section, photo, write_report
from sparse_seg.lab.report.tables import Column, Table
from tests.reporting.browser import Browser, needs_browser, opened
from tests.reporting.test_html import Outline

STEPS = [("dense OS16", "mIoU 50.00 %"), ("f=0.1", "mIoU 55.00 %"), ("dense OS8", "mIoU 60.00 %")]
OUTPUT, CUT = 'document.querySelector("output").textContent', 'document.querySelector(".cut")'
SHOWN = '[...document.querySelectorAll("article:first-of-type .step")].filter(s => s.offsetParent || '
SHOWN += "getComputedStyle(s).display != 'none').map(s => s.dataset.step)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def picture(grey: int, caption: str):
        return photo(np.full((90, 160, 3), grey, np.uint8), caption)

    shots = [
        Shot(picture(40 * step, f"<{step}>"), picture(9, "blocks") if step == 1 else None)
        for step in range(3)
    ]
    frames = [
        Frame(f"frame {number}", "3.0 % differ", [picture(200, "input")], picture(120, "dense OS8"), shots)
        for number in range(2)
    ]
    table = Table([Column("network", "network")], [{"network": name} for name, _ in STEPS])
    sections = [Section("Table", table=table, links={0: "#step-0", 2: "#step-2"})]
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report(path, "Report", [*sections, Explorer("Look", "around", STEPS, frames, 1)])
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with opened(tmp_path_factory.mktemp("browser")) as found:
        yield found


def test_the_page_is_whole_without_a_script(page: Path) -> None:
    outline = Outline(page.read_text())
    assert outline.open == []
    for name, value in STEPS:
        assert page.read_text().count(f'<p class="says">{name}: {value}</p>') == 2
    links = [attributes["href"] for tag, attributes in outline.tags if tag == "a"]
    places = {attributes.get("id") for _, attributes in outline.tags}
    assert links == ["#step-0", "#step-2"]
    assert {str(link)[1:] for link in links} <= places


@pytest.mark.slow
@needs_browser
def test_the_slider_moves_numbers_and_pictures(page: Path, browser: Browser) -> None:
    browser.open(page)
    assert browser.value(OUTPUT) == "f=0.1: mIoU 55.00 %"
    assert browser.value(SHOWN) == ["1"]
    browser.value('document.querySelector(".fraction").focus()')
    browser.press("ArrowRight", 39)
    assert browser.value(OUTPUT) == "dense OS8: mIoU 60.00 %"
    assert browser.value(SHOWN) == ["2"]
    browser.press("Home", 36)
    assert browser.value(OUTPUT) == "dense OS16: mIoU 50.00 %"
    assert browser.value(
        'document.querySelector(".fraction").getAttribute("aria-valuetext")'
    ) == browser.value(OUTPUT)
    assert [url for url in browser.requests if not url.startswith(("file:", "data:", "about:"))] == []


@needs_browser
def test_links_of_the_table_set_the_slider(page: Path, browser: Browser) -> None:
    browser.open(page)
    browser.value('document.querySelector("td a").focus()')
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", windowsVirtualKeyCode=13, text="\r")
    end = time.monotonic() + 10
    while browser.value(OUTPUT) == "f=0.1: mIoU 55.00 %" and time.monotonic() < end:
        time.sleep(0.05)
    assert browser.value("location.hash") == "#step-0"
    assert browser.value(OUTPUT) == "dense OS16: mIoU 50.00 %"


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_divider_cuts_one_frame(page: Path, browser: Browser, width: int) -> None:
    browser.open(page, width)
    clip = 'getComputedStyle(document.querySelectorAll(".step.on .prediction img")[{}]).clipPath'
    assert "50%" in browser.value(clip.format(0))
    browser.value(f"{CUT}.focus()")
    browser.press("Home", 36)
    assert "50%" not in browser.value(clip.format(0))
    assert "50%" in browser.value(clip.format(1))
    box = 'document.querySelector("article .{}").getBoundingClientRect()'
    same = [
        browser.value(f"{box.format(part)}.{side}")
        for side in ("top", "left")
        for part in ("reference img", "step.on .prediction img")
    ]
    assert same[0] == same[1]
    assert same[2] == same[3], "the pictures lie on each other"
    assert browser.value("document.documentElement.scrollWidth") <= width, "nothing sticks out"


@needs_browser
def test_without_a_script_all_is_shown(page: Path, browser: Browser) -> None:
    browser.open(page, script=False)
    root = browser.call("DOM.getDocument")["root"]["nodeId"]
    steps = browser.call("DOM.querySelectorAll", nodeId=root, selector=".step .prediction img")["nodeIds"]
    for step in steps:
        assert browser.call("DOM.getBoxModel", nodeId=step)["model"]["height"] > 50
    controls = browser.call("DOM.querySelector", nodeId=root, selector=".controls")["nodeId"]
    style = browser.call("CSS.enable") or browser.call("CSS.getComputedStyleForNode", nodeId=controls)
    assert {"name": "display", "value": "none"} in style["computedStyle"]
    browser.open(page)


class Sequences(SegmentationDataset):
    """24 frames of 10x10 pixels, of two sequences; the value of frame 11 is highest."""

    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 24

    def name(self, index: int) -> str:
        return f"{'ab'[index // 12]}_{index:04}_left"

    def load(self, index: int):
        return np.full((10, 10, 3), 50 - abs(2 * index - 22), np.uint8), np.zeros((10, 10), np.uint8)


class Differs:
    """Differs from a label of zeros on as many pixels as the frame's value says."""

    def classes(self, image: np.ndarray, label: np.ndarray):
        return (np.arange(100) < image[0, 0, 0]).astype(np.uint8).reshape(10, 10), None


class Right:
    def classes(self, image: np.ndarray, label: np.ndarray):
        return label, None


def test_frames_differ_most_and_are_no_neighbours() -> None:
    chosen = most_different((Right(), Differs()), Sequences(), 24)  # type: ignore[arg-type]
    assert chosen == [(0.5, 11), (0.48, 12), (0.44, 8), (0.42, 15)], "12 is of another sequence than 11"


def test_numbers_tell_the_lift() -> None:
    coarse, fine = ({"miou": m, "gmacs": 1.0, "milliseconds": t} for m, t in ((50.0, 10.0), (60.0, 20.0)))
    row = {"miou": 58.0, "gmacs": 0.5, "milliseconds": 13.0}
    assert numbers(row, coarse, fine) == "mIoU 58.00 %, 0.50 GMACs, 13.0 ms, lift +0.50"
    assert numbers(fine, coarse, fine) == "mIoU 60.00 %, 1.00 GMACs, 20.0 ms"
    assert numbers(row | {"milliseconds": None}, coarse, fine) == "mIoU 58.00 %, 0.50 GMACs"
