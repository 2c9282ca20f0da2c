"""Videos there and back: frames, size, rate; what is written besides; damage; cameras; budgets of time."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sparse_seg.checkpoint import load, save
from sparse_seg.data.reading import read_label
from sparse_seg.lab.predict.segment import ImageSegmenter
from sparse_seg.lab.predict.video import writable_rate
from sparse_seg.masks import ConfidencePolicy
from sparse_seg.masks.previous import PreviousPolicy
from sparse_seg.run.build import build_model
from sparse_seg.run.way import Way
from tests.cli.commands import done, fails
from tests.reference import randomise

FRAMES, RATE, SIZE = 9, 12.5, (96, 64)  # width, height


@pytest.fixture
def video(tmp_path) -> Path:
    """A bright bar that moves to the right."""
    path = tmp_path / "in" / "drive.avi"
    path.parent.mkdir()
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), RATE, SIZE)
    for number in range(FRAMES):
        frame = np.full((SIZE[1], SIZE[0], 3), 40, np.uint8)
        frame[:, 8 * number : 8 * number + 12] = (60, 120, 240)
        writer.write(frame)
    writer.release()
    return path


def properties(path: Path) -> tuple[int, float, tuple[int, int]]:
    capture, count = cv2.VideoCapture(str(path)), 0
    while capture.read()[0]:
        count += 1
    return count, capture.get(cv2.CAP_PROP_FPS), (int(capture.get(3)), int(capture.get(4)))


def test_there_and_back(checkpoint, video, tmp_path, capsys, caplog):
    """Two videos of one content: a policy that looks back forgets the one before."""
    out, again = tmp_path / "out", shutil.copy(video, video.with_name("again.avi"))
    more = ["--video-ids", "--video-blocks", "--policy", "previous", "--json", str(tmp_path / "v.json")]
    done("predict", checkpoint, video.parent, "--out", out, *more)
    said = capsys.readouterr()
    assert f"{video}: {FRAMES} frames, " in said.out
    assert not said.err, "no bar without a terminal"
    for name in ("drive.mp4", "drive_blocks.mp4", "again.mp4"):
        assert properties(out / name) == (FRAMES, RATE, SIZE)
    for first, second in zip(
        *(sorted((out / f"{n}_ids").iterdir()) for n in ("drive", "again")), strict=True
    ):
        assert read_label(first).shape == (64, 96)
        assert first.read_bytes() == second.read_bytes()
    assert first.name == "000008.png"
    assert not list(out.glob(".*"))
    images = json.loads((tmp_path / "v.json").read_text())["images"]
    assert set(images) == {str(video), str(again)}
    for found in images.values():
        assert found["frames"] == FRAMES
        assert found["fine_fraction"] == pytest.approx(round(0.15 * 24) / 24)
        assert sum(found["shares"].values()) == pytest.approx(1)
    done("predict", checkpoint, again, "--out", out, "--video-ids", "--limit", 7)
    assert f"{out / 'again_ids/000007.png'} and 1 more are of an earlier run" in caplog.text
    capture = cv2.VideoCapture(str(out / "drive.mp4"))
    for number in range(3):  # the bar's red shines through where it is
        red = capture.read()[1][..., 2].astype(float).mean(0)
        assert red[8 * number + 2 : 8 * number + 10].mean() > red[8 * number + 20 :].mean() + 50


def test_rates_that_mpeg4_cannot_tell_become_the_nearest() -> None:
    rates = {239.759: 239.76, 105.611: 105.61, 66.667: 66.67, 65.535: 65.535, 30000 / 1001: 29.97}
    rates |= {90000: 65535, 1 / 60: 0.017, 1e-4: 0.002}
    assert [writable_rate(rate) for rate in rates] == list(rates.values())


def test_a_name_with_colons_is_no_protocol_of_ffmpegs(checkpoint, video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(video, "file:1:0.avi")
    done("predict", checkpoint, "file:1:0.avi", "--out", ".", "--limit", "1", "--video-blocks")
    for file in ("file:1:0.mp4", "file:1:0_blocks.mp4"):
        assert properties(Path.cwd() / file) == (1, RATE, SIZE)


def test_a_video_that_cannot_be_written(checkpoint, video, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sparse_seg.lab.predict.video.CODEC", "none")
    line = fails(capsys, "predict", checkpoint, video, "--out", tmp_path / "o")
    assert f"{tmp_path}/o/drive.mp4: cannot be written: OpenCV's none encoder is missing, or does not" in line
    assert not list((tmp_path / "o").iterdir())
    (tmp_path / "file").write_text("")
    assert "error: " in (line := fails(capsys, "predict", checkpoint, video, "--out", tmp_path / "file/o"))
    assert "Not a directory" in line


def test_damaged_videos(checkpoint, video, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all")
    arguments = ["predict", checkpoint, broken, video, "--out", tmp_path / "out"]
    assert f"{broken}: cannot be opened: damaged, or of an unknown format" in fails(capsys, *arguments)
    assert properties(tmp_path / "out/drive.mp4")[0] == FRAMES, "the other one is done"
    assert not (tmp_path / "out/broken.mp4").exists()
    content = video.read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(content[: content.index(b"movi") + (len(content) - content.index(b"movi")) // 2])
    line = fails(capsys, "predict", checkpoint, cut, "--out", tmp_path)
    count = properties(tmp_path / "cut.mp4")[0]
    assert 0 < count < FRAMES, "what could be read is kept"
    assert f"only {count} of {FRAMES} frames could be read, those in {tmp_path / 'cut.mp4'}; it is" in line
    (tmp_path / "drive.mp4").write_bytes(content)
    itself = ["predict", checkpoint, tmp_path / "drive.mp4", "--out", tmp_path]
    assert "would be overwritten" in fails(capsys, *itself)


def test_a_camera(checkpoint, video, tmp_path, capsys, monkeypatch):
    assert "camera:77: cannot be opened: no such camera" in fails(
        capsys, "predict", checkpoint, "camera:77", "--out", tmp_path / "none"
    )
    assert not (tmp_path / "none").exists()
    real = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: real(str(video) if source == 0 else source))

    def stop(*arguments):
        raise KeyboardInterrupt

    arguments = ["predict", str(checkpoint), "camera:0", "--out", str(tmp_path / "out")]
    done(*arguments, "--limit", "5")
    assert properties(tmp_path / "out/camera0.mp4")[0] == 5
    follow, calls = ImageSegmenter.follow, []

    def three(self, image, budget):
        calls.append(image)
        return stop() if len(calls) > 3 else follow(self, image, budget)

    monkeypatch.setattr(ImageSegmenter, "follow", three)
    done(*arguments)  # Ctrl-C
    assert properties(tmp_path / "out/camera0.mp4")[0] == 3


@torch.no_grad()
def test_the_previous_frames_uncertainty_chooses():
    """Its first mask is confidence's; the next one's scores are of the pass before, without a coarse pass."""
    torch.manual_seed(0)
    model = build_model({"width": 0.125, "head_channels": 16, "num_classes": 5})
    randomise(model)
    model.eval()
    policy, images = model.policy_for(Way.policy("previous", 0.25)), torch.randn(3, 1, 3, 64, 96)
    confidence = ConfidencePolicy(0.25)
    assert isinstance(policy, PreviousPolicy)
    runs = []
    for image in images:
        run = model.start(image).follow(None, policy)
        run.classes()
        policy.remember(run)
        runs.append(run)
    own = model.start(images[0]).follow(None, confidence)
    assert own.mask is not None
    assert torch.equal(runs[0].levels, own.levels)
    assert runs[0].macs() == own.macs()
    for before, run, image in zip(runs, runs[1:], images[1:], strict=False):
        assert run.mask is not None
        scores = confidence.logit_scores(before.logits()[..., 2::4, 2::4])
        assert torch.equal(run.mask, confidence.cut(scores))
        assert run.macs() == model.start(image).take(run.mask).macs() | {"mask": 0}
        assert sum(run.macs().values()) < sum(own.macs().values())
    small = model.start(images[0, ..., :48]).follow(None, policy)
    assert small.levels.shape == (1, 4, 3), "another size starts anew"


def test_a_large_video_is_scaled_and_kept_up_with(checkpoint, video, tmp_path, capsys):
    """To the area of the training frames; in 100 s a frame all blocks are refined, in a millisecond none."""
    file = load(checkpoint)
    save(replace(file, path=tmp_path / "small.safetensors", training={"frame": [45, 67]}))
    arguments = ["predict", tmp_path / "small.safetensors", video, "--json", tmp_path / "s.json"]
    for option, value, fine in (("--policy", "previous", 0.15), ("--fps", "0.01", 1), ("--fps", "1000", 0)):
        out = tmp_path / f"out{value}"
        done(*arguments, option, value, "--limit", "4", "--out", out)
        assert "1 of 1 inputs scaled by 0.701 to the area of the training frames" in capsys.readouterr().out
        assert properties(out / "drive.mp4") == (4, RATE, SIZE)
        (said,) = json.loads((tmp_path / "s.json").read_text())["images"].values()
        assert said["scales"] == pytest.approx([0.7005], abs=1e-4)
        assert said["fine_fraction"] == pytest.approx(fine, abs=0.1 if option == "--policy" else 0)
    line = fails(capsys, *arguments, "--fps", "10", "--flip", "--out", tmp_path / "out", code=2)
    assert "--fps: refines one look; leave out --flip" in line
    for option, value, message in (
        ("--dense", "8", "--fps: refines as far as the time allows; leave out --dense"),
        ("--fine-fraction", "0.1", "leave out --fine-fraction"),
        ("--policy", "edge", "--fps: ranks blocks by a coarse pass, which edge does not read"),
    ):
        line = fails(capsys, *arguments, "--fps", "10", option, value, "--out", tmp_path / "out", code=2)
        assert message in line


@pytest.mark.slow
def test_a_video_changes_over_to_onnxruntime(checkpoint, video, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnx", reason="needs the package onnx")
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    monkeypatch.setattr("sparse_seg.export.runner.NODE_SECONDS", 0.0)
    monkeypatch.setattr("sparse_seg.export.runner.RUNS", 0.25 * 6)  # as long as six frames are more to come
    for runtime in ("torch", "auto"):
        arguments = ["predict", str(checkpoint), str(video), "--out", str(tmp_path / runtime)]
        done(*arguments, "--runtime", runtime, "--ids-only")
    assert "runtime: onnxruntime for 7 of 9 runs, torch for the others" in capsys.readouterr().out
    for number in range(FRAMES):
        ids = [read_label(tmp_path / one / f"drive_ids/{number:06d}.png") for one in ("torch", "auto")]
        assert (ids[0] == ids[1]).mean() > 0.99
