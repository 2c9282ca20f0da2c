"""The generator: same seed, same bytes; Cityscapes' layout and ids; all or nothing on disk."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from sparse_seg.data import build_dataset
from sparse_seg.data.scenes import files, render_scene, write_scenes
from sparse_seg.errors import DataError

_STATIC, _EGO_VEHICLE = 4, 1
_ALWAYS = {7: "road", 11: "building"}
_DRAWN = {7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 33}


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_same_seed_same_scene() -> None:
    first, again, other = (render_scene(np.random.default_rng(seed), (64, 128)) for seed in (1, 1, 2))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first[0] != other[0]).any()


@pytest.mark.parametrize("size", [(256, 512), (64, 128), (33, 47), (200, 100)])
def test_shapes(size: tuple[int, int]) -> None:
    image, label = render_scene(np.random.default_rng(0), size)
    assert image.shape == (*size, 3)
    assert label.shape == size
    assert image.dtype == label.dtype == np.uint8


@pytest.mark.slow
def test_classes_over_many_scenes() -> None:
    seen = [
        set(np.unique(render_scene(np.random.default_rng(seed), (96, 192))[1]).tolist()) for seed in range(60)
    ]
    assert set().union(*seen) == _DRAWN | {_STATIC, _EGO_VEHICLE}
    assert all(set(_ALWAYS) <= ids for ids in seen)


@pytest.mark.slow
def test_classes_are_not_told_by_colour_alone() -> None:
    """Road, pavement and buildings share grey levels, within and between scenes."""
    pixels: dict[int, list[np.ndarray]] = {7: [], 8: [], 11: []}
    for seed in range(20):
        image, label = render_scene(np.random.default_rng(seed), (96, 192))
        for label_id, values in pixels.items():
            values.append(image[label == label_id].mean(axis=1))
    spans = [np.percentile(np.concatenate(values), (5, 95)) for values in pixels.values()]
    for low, high in spans:
        for other_low, other_high in spans:
            assert min(high, other_high) - max(low, other_low) > 50


def test_label_borders_lie_on_image_edges() -> None:
    """The sky's outline is where the picture changes: labels are not shifted against the image."""
    rng = np.random.default_rng(11)
    for _ in range(3):
        image, label = render_scene(rng, (128, 256))
        grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), 1).astype(np.float32)
        strength = np.abs(np.diff(grey, axis=1))
        border = (label[:, 1:] == 23) != (label[:, :-1] == 23)
        shifted = [strength[np.roll(border, shift, axis=1)].mean() for shift in (-4, -2, 0, 2, 4)]
        assert np.argmax(shifted) == 2


@pytest.mark.slow
def test_files(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "scenes"
    assert write_scenes(out, 5, (48, 64), seed=3)
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    expected = {"scenes.json"}
    for split, count in (("train", 4), ("val", 1)):
        for index in range(count):
            stem = f"scenes_{index:06d}_000019"
            expected |= {
                f"leftImg8bit/{split}/scenes/{stem}_leftImg8bit.png",
                f"gtFine/{split}/scenes/{stem}_gtFine_labelIds.png",
            }
    assert names == expected
    assert [path.name for path in out.parent.iterdir()] == ["scenes"]
    for split, count in (("train", 4), ("val", 1)):
        dataset = build_dataset("scenes", out, split)
        dataset.check()
        assert len(dataset) == count
    image, label_ids = render_scene(np.random.default_rng([3, 1, 0]), (48, 64))
    np.testing.assert_array_equal(dataset.load(0)[0], image)
    assert ((dataset.load(0)[1] == 0) == (label_ids == 7)).all()


@pytest.mark.slow
def test_larger_counts_and_workers_give_the_same_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.os, "cpu_count", lambda: 1)
    write_scenes(tmp_path / "few", 5, (32, 48), seed=1)
    monkeypatch.setattr(files.os, "cpu_count", lambda: 2)
    write_scenes(tmp_path / "many", 2 * files._SCENES_PER_WORKER, (32, 48), seed=1)
    few, many = contents(tmp_path / "few"), contents(tmp_path / "many")
    assert len(few) == 11
    for name in few.keys() - {"scenes.json"}:
        assert few[name] == many[name]


def test_same_request_keeps_the_folder(tmp_path: Path) -> None:
    assert write_scenes(tmp_path / "out", 2, (32, 48))
    before = (tmp_path / "out" / "scenes.json").stat().st_mtime_ns
    assert not write_scenes(tmp_path / "out", 2, (32, 48))
    assert (tmp_path / "out" / "scenes.json").stat().st_mtime_ns == before


def test_other_request_is_refused(tmp_path: Path) -> None:
    write_scenes(tmp_path, 2, (32, 48))  # an empty folder is taken
    with pytest.raises(DataError, match=r'holds other scenes \(.*"seed": 0.*\) than asked for .*"seed": 1'):
        write_scenes(tmp_path, 2, (32, 48), seed=1)


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds no synthetic scenes; choose another folder"):
        write_scenes(tmp_path, 2, (32, 48))
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="out: exists and holds no synthetic scenes"):
        write_scenes(tmp_path / "out", 2, (32, 48))


def test_incomplete_folder_is_refused(tmp_path: Path) -> None:
    write_scenes(tmp_path, 2, (32, 48))
    next(tmp_path.glob("gtFine/val/*/*.png")).unlink()
    with pytest.raises(DataError, match="2 images and 1 labels of 2 scenes are left; remove the folder"):
        write_scenes(tmp_path, 2, (32, 48))


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, image: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_png", full)
    with pytest.raises(DataError, match=r"out: cannot be written \(No space left on device\)"):
        write_scenes(tmp_path / "out", 2, (32, 48))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [{"count": 1}, {"size": (16, 64)}, {"seed": -1}, {"val_fraction": 1.0}])
def test_impossible_request(tmp_path: Path, bad: dict) -> None:
    with pytest.raises(ValueError, match="expected count >= 2"):
        write_scenes(tmp_path / "out", **{"count": 4, **bad})


def test_missing_scenes_name_the_tool(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"python tools/make_scenes.py {tmp_path}/none"):
        build_dataset("scenes", tmp_path / "none", "train")


def test_record_is_plain_json(tmp_path: Path) -> None:
    write_scenes(tmp_path, 3, (32, 48), seed=9, val_fraction=0.4)
    assert json.loads((tmp_path / "scenes.json").read_text()) == {
        "version": 1,
        "count": 3,
        "size": [32, 48],
        "seed": 9,
        "val_fraction": 0.4,
    }
