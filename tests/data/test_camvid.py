"""CamVid's folder form; the real frames are tested where they lie beside the repository."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from sparse_seg.data import build_dataset
from sparse_seg.data.camvid import CamVid
from sparse_seg.errors import DataError
from tests.shared import SHARED, needs_shared

FRAMES = SHARED / "data/camvid"


def test_void_is_ignored(tmp_path: Path) -> None:
    for folder, pixels in (
        ("val", np.zeros((1, 12, 3), np.uint8)),
        ("valannot", np.arange(12, dtype=np.uint8)[None]),
    ):
        (tmp_path / folder).mkdir()
        assert cv2.imwrite(str(tmp_path / folder / "frame.png"), pixels)
    _, label = build_dataset("camvid", tmp_path, "val").load(0)
    assert label.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 255]]


def test_same_stem_twice(tmp_path: Path) -> None:
    (tmp_path / "valannot").mkdir()
    (tmp_path / "val").mkdir()
    for name in ("frame.png", "frame.jpg"):
        (tmp_path / "val" / name).touch()
    with pytest.raises(DataError, match=r"frame\.png: frame\.jpg has the same stem"):
        CamVid(tmp_path, "val")


def test_empty_split(tmp_path: Path) -> None:
    (tmp_path / "valannot").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match=r"val: no \.jpg or \.png image"):
        CamVid(tmp_path, "val")


@pytest.mark.slow
@needs_shared("data/camvid")
@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101)])
def test_real_split_is_sound(split: str, count: int) -> None:
    dataset = build_dataset("camvid", FRAMES, split)
    dataset.check()
    assert len(dataset) == count


@needs_shared("data/camvid")
def test_real_frame() -> None:
    dataset = build_dataset("camvid", FRAMES, "val")
    image, label = dataset.load(0)
    assert image.shape == (360, 480, 3)
    assert label.shape == (360, 480)
    names = np.array(dataset.classes.names)
    assert {"Sky", "Building", "Road"} <= set(names[np.unique(label[label != 255])])
    rows = {
        name: np.nonzero(label == index)[0].mean()
        for index, name in enumerate(names)
        if name in ("Sky", "Road")
    }
    assert rows["Sky"] < rows["Road"]
