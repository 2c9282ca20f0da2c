"""Pixels of pictures, at sizes that no block divides."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_seg.lab.report.overlays import (
    COARSE_BRIGHTNESS,
    GAP,
    LEGEND_HEIGHT,
    LEVEL_TINTS,
    OUTLINE,
    colourise,
    contact_sheet,
    draw_blocks,
    draw_levels,
    overlay,
    side_by_side,
    write_image,
)

PALETTE = [(10, 20, 30), (200, 100, 0)]
LABEL = np.array([[0, 1, 255], [1, 1, 0]])


def grey(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_colourise(dtype: type) -> None:
    picture = colourise(LABEL.astype(dtype), PALETTE)
    assert picture.dtype == np.uint8
    assert picture.tolist() == [
        [[10, 20, 30], [200, 100, 0], [0, 0, 0]],
        [[200, 100, 0], [200, 100, 0], [10, 20, 30]],
    ]


def test_overlay_mixes_colours_and_leaves_ignored_pixels() -> None:
    picture = overlay(grey(2, 3), LABEL, PALETTE, alpha=0.5)
    assert picture[0].tolist() == [[55, 60, 65], [150, 100, 50], [100, 100, 100]]
    np.testing.assert_array_equal(overlay(grey(2, 3), LABEL, PALETTE, alpha=0), grey(2, 3))


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([8, 16]), st.integers(0, 2**32 - 1))
def test_blocks_lie_on_their_pixels(height: int, width: int, block: int, seed: int) -> None:
    shape = -(-height // block), -(-width // block)
    fine_blocks = np.random.default_rng(seed).random(shape) < 0.5
    picture = draw_blocks(grey(height, width), fine_blocks, block)
    fine = np.kron(fine_blocks, np.ones((block, block), bool))[:height, :width]
    assert (picture[~fine] == int(100 * COARSE_BRIGHTNESS)).all()
    assert ((picture[fine] == 100).all(1) | (picture[fine] == OUTLINE).all(1)).all()


def test_outline_runs_around_the_region_not_each_block_nor_the_image() -> None:
    fine_blocks = np.array([[True, True, False], [True, True, False]])
    outlined = (draw_blocks(grey(25, 40), fine_blocks) == OUTLINE).all(axis=2)
    assert outlined[:, 31].all()
    assert outlined.sum() == 25


@pytest.mark.parametrize(
    ("strides", "tints"), [((8, 16, 32), (0, 1, 2)), ((8, 16), (0, 2)), ((4, 8, 16), (0, 1, 2))]
)
def test_levels_have_their_strides_colour_and_grid(strides: tuple[int, ...], tints: tuple[int, ...]) -> None:
    """A block's pixels are the image tinted, darker on the lines of its own stride's grid."""
    height, width, block = 50, 150, strides[-1]
    levels = np.random.default_rng(0).integers(0, len(strides), (-(-height // block), -(-width // block)))
    picture = draw_levels(grey(height, width), levels, strides)
    assert picture.shape == (height + LEGEND_HEIGHT, width, 3)
    for y, x in np.ndindex(height, width):
        level = levels[y // block, x // block]
        colour = 0.55 * 100 + 0.45 * np.array(LEVEL_TINTS[tints[level]])
        step = strides[len(strides) - 1 - level]
        expected = colour * (0.75 if y % step == 0 or x % step == 0 else 1)
        assert np.abs(picture[y, x] - expected).max() <= 3
    assert (picture[height:] != 255).any(), "a legend"


def test_side_by_side_keeps_pixels_and_shrinks_titles() -> None:
    pictures = [grey(197, 333, 10), grey(101, 41, 20), grey(197, 1, 30)]
    row = side_by_side([*zip(["image", "a title wider than its picture", ""], pictures, strict=True)])
    top = row.shape[0] - 197
    assert 20 <= top <= 40
    assert row.shape == (top + 197, 333 + 41 + 1 + 2 * GAP, 3)
    left = 0
    for picture in pictures:
        height, width = picture.shape[:2]
        np.testing.assert_array_equal(row[top : top + height, left : left + width], picture)
        assert (row[top + height :, left : left + width] == 255).all()
        assert (row[:, left + width : left + width + GAP] == 255).all()
        left += width + GAP
    assert (row[:top, :333] < 128).any(), "the title is not there"
    second = row[:top, 333 + GAP : 333 + GAP + 41].min(axis=(0, 2)) < 200
    assert second.any()
    assert not second[-1], "the title is cut off"


def test_contact_sheet_is_white_where_a_row_is_shorter() -> None:
    sheet = contact_sheet([[("a", grey(32, 40)), ("b", grey(32, 40))], [("c", grey(32, 40))]])
    assert sheet.shape[1] == 80 + GAP
    assert (sheet[sheet.shape[0] // 2 + 22 :, 41:] == 255).all()


def test_written_images_keep_their_values(tmp_path: Path) -> None:
    picture = colourise(LABEL, PALETTE)
    write_image(tmp_path / "new" / "picture.png", picture)
    stored = cv2.imread(str(tmp_path / "new" / "picture.png"))
    assert stored is not None
    np.testing.assert_array_equal(stored[..., ::-1], picture)
    write_image(tmp_path / "label.png", LABEL.astype(np.uint8))
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "label.png"), cv2.IMREAD_UNCHANGED), LABEL)


@pytest.mark.parametrize(
    ("name", "reason"), [("a.xyz", "use .png or .jpg"), ("a", "use .png"), ("a.png", "disk full")]
)
def test_an_image_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=rf"cannot write image .*{name}: .*{reason}"):
        write_image(tmp_path / name, grey(2, 2))
    assert not list(tmp_path.iterdir())
