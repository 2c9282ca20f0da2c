"""The cost curve is an image with its series and references on it, and leaves no global state."""

import sys
from typing import Any

import cv2
import numpy as np
import pytest

from sparse_seg.errors import SparseSegError
from sparse_seg.lab.report import plots
from sparse_seg.lab.report.plots import COLOURS, cost_curve

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
