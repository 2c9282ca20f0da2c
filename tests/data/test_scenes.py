"""The generator: same seed, same bytes; Cityscapes' layout and ids; all or nothing on disk; its command."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from sparse_seg.cli import main
from sparse_seg.data import build_dataset
from sparse_seg.data.scenes import FRAMES, files, render_scene, write_scenes
from sparse_seg.errors import DataError

_IGNORED = {1, 4}  # ego vehicle, static
_DRAWN = {7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 33}


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.mark.parametrize("size", [(256, 512), (33, 47), (200, 100)])
def test_a_seed_gives_a_scene(size: tuple[int, int]) -> None:
    first, again, other = (render_scene(np.random.default_rng(seed), size) for seed in (1, 1, 2))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first[0] != other[0]).any()
    assert (first[0].shape, first[1].shape) == ((*size, 3), size)
    assert first[0].dtype == first[1].dtype == np.uint8


@pytest.mark.slow
def test_many_scenes_hold_all_classes_which_colour_alone_does_not_tell() -> None:
    """Road, pavement and buildings share grey levels, within and between scenes."""
    pixels: dict[int, list[np.ndarray]] = {7: [], 8: [], 11: []}
    seen: set[int] = set()
    for seed in range(30):
        image, label = render_scene(np.random.default_rng(seed), (96, 192))
        ids = set(np.unique(label).tolist())
        assert {7, 11} <= ids, "road and building"
        seen |= ids
        for label_id, values in pixels.items():
            values.append(image[label == label_id].mean(axis=1))
    assert seen == _DRAWN | _IGNORED
    spans = [np.percentile(np.concatenate(values), (5, 95)) for values in pixels.values()]
    assert min(high for _, high in spans) - max(low for low, _ in spans) > 50


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
def test_files_are_a_sound_dataset_and_more_scenes_only_add(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = tmp_path / "deep/few", tmp_path / "many"
    monkeypatch.setattr(files.os, "cpu_count", lambda: 2)
    assert write_scenes(few, 5, (48, 64), seed=3)
    assert write_scenes(many, 2 * files._SCENES_PER_WORKER, (48, 64), seed=3)  # by two processes
    assert [path.name for path in few.parent.iterdir()] == ["few"]
    own, more = contents(few), contents(many)
    record = {"version": 2, "count": 5, "size": [48, 64], "seed": 3, "val_fraction": 0.2}
    assert json.loads(own.pop("scenes.json")) == record
    assert all(more[name] == content for name, content in own.items())
    names = [
        f"{split}/scenes/scenes_{i:06d}_000019" for split, n in (("train", 4), ("val", 1)) for i in range(n)
    ]
    kinds = (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds"))
    assert set(own) == {f"{folder}/{name}_{kind}.png" for name in names for folder, kind in kinds}
    build_dataset("scenes", few, "train").check()
    dataset = build_dataset("scenes", few, "val")
    image, label_ids = render_scene(np.random.default_rng([3, 1, 0]), (48, 64))
    np.testing.assert_array_equal(dataset.load(0)[0], image)
    assert ((dataset.load(0)[1] == 0) == (label_ids == 7)).all()


def test_a_folder_is_kept_or_refused_but_never_changed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is taken
    assert write_scenes(out, 2, (32, 48))
    before = contents(out)
    assert not write_scenes(out, 2, (32, 48))
    with pytest.raises(DataError, match=r'holds other scenes \(.*"seed": 0.*\) than asked for .*"seed": 1'):
        write_scenes(out, 2, (32, 48), seed=1)
    assert contents(out) == before
    next(out.glob("gtFine/val/*/*.png")).unlink()
    with pytest.raises(DataError, match="2 images and 1 labels of 2 scenes are left; remove the folder"):
        write_scenes(out, 2, (32, 48))
    (tmp_path / "foreign").mkdir()
    for name in ("foreign/thesis.tex", "file"):
        (tmp_path / name).write_text("years of work")
    for name in ("foreign", "file"):
        with pytest.raises(DataError, match=f"{name}: exists and holds no synthetic scenes; choose another"):
            write_scenes(tmp_path / name, 2, (32, 48))
    assert contents(tmp_path / "foreign") == {"thesis.tex": b"years of work"}
    with pytest.raises(DataError, match=f"sparse-seg make-scenes {tmp_path}/none"):
        build_dataset("scenes", tmp_path / "none", "train")


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_scene", full)
    with pytest.raises(DataError, match=r"out: cannot be written \(No space left on device\)"):
        write_scenes(tmp_path / "out", 2, (32, 48))
    assert list(tmp_path.iterdir()) == []


def test_the_command_and_a_camera_that_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["make_scenes", str(tmp_path / "out"), "--count", "2", "--size", "32x48", "--pan", "5"]
    assert main(command) == 0
    assert "2 scenes written to" in capsys.readouterr().out
    dataset = build_dataset("scenes", tmp_path / "out", "train")
    dataset.check()
    assert [number for number in range(len(dataset)) if dataset.starts(number)] == [0]
    for before, frame in ((0, 1), (FRAMES - 2, FRAMES - 1)):
        for one, two in zip(dataset.load(before), dataset.load(frame), strict=True):
            assert one.shape[:2] == (32, 48)
            assert (one[:, 5:] == two[:, :-5]).all()
    assert main(command) == 0
    assert "2 scenes are already in" in capsys.readouterr().out
    assert main([*command[:-1], "6"]) == 1, "another speed is another data set"
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "choose another folder" in message
