"""Pictures from a checkpoint alone: what is written, and what happens to files that are none."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import sparse_seg
from sparse_seg.checkpoint import load, save
from sparse_seg.cli import main
from sparse_seg.data.class_file import read_class_file
from sparse_seg.data.dataset import read_image
from sparse_seg.data.reading import read_label
from sparse_seg.errors import DataError
from sparse_seg.export.onnx_segmentor import OnnxSegmentor
from sparse_seg.run.card import Card
from sparse_seg.run.way import Way
from tests.cli.commands import done, fails
from tests.cli.conftest import IDS, NAMES
from tests.data.files import sideways_photo


def test_a_checkpoint_alone_names_classes_ids_and_colours(own, predict, photo, tmp_path, capsys):
    (own / "data").rename(own / "gone")
    said = predict(photo, "--fine-fraction", 0.5)
    (own / "gone").rename(own / "data")
    assert "1 image segmented" in capsys.readouterr().out
    ids = read_label(tmp_path / "out/photo_ids.png")
    assert ids.shape == (75, 97)
    assert set(np.unique(ids)) <= set(IDS)
    known = read_class_file(tmp_path / "out/classes.yaml")
    assert known.classes.names == tuple(NAMES)
    assert [known.train_ids[value] for value in IDS] == [0, 1, 2]
    colours = read_image(tmp_path / "out/photo_classes.png")
    for value, colour in zip(IDS, known.classes.palette, strict=True):
        assert (colours[ids == value] == colour).all()
    assert read_image(tmp_path / "out/legend.png").shape[2] == 3
    (image,) = said["images"].values()
    assert said["classes"] == NAMES
    assert sum(image["shares"].values()) == pytest.approx(1)
    assert image["shares"].get("wall", 0) == pytest.approx((ids == 7).mean())
    assert image["fine_fraction"] == round(0.5 * 35) / 35


@pytest.mark.slow
def test_a_large_photo_runs_through_windows_and_that_is_said(predict, tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "large.png"), np.zeros((300, 560, 3), np.uint8))
    for window, count in ((256, 2 * 4), (0, 1), (600, 1)):
        (image,) = predict(tmp_path / "large.png", "--scales", 1, "--window", window)["images"].values()
        said = capsys.readouterr().out
        assert ("large images in windows of 256 px, not exact near seams" in said) == (count > 1)
        assert image["windows"] == count


def test_photos_are_scaled_to_the_training_frames(predict, checkpoint, model, tmp_path, capsys):
    """As --scales asked for by hand does, which wins; frames of the trained size stay as they are."""
    assert load(checkpoint).training["frame"] == [64, 96]
    small = np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8)
    frame, photo = tmp_path / "frame.png", tmp_path / "photo.png"
    for file, factor in ((frame, 1), (photo, 4)):
        cv2.imwrite(str(file), cv2.resize(small, None, fx=factor, fy=factor))

    def ids(inputs: list[Path], *options: object, scales: list[float]) -> list[np.ndarray]:
        said = predict(*inputs, *options, "--steps", 0, 0.5)["images"].values()
        scaled = "1 of 2 inputs scaled by 0.25 to the area of the training frames, 64x96 px; --scales 1: as"
        assert (scaled in capsys.readouterr().out) == (not options)
        assert [image["scales"] for image in said] == [[scale] for scale in scales]
        assert read_image(tmp_path / f"out/{inputs[-1].stem}_steps.png").shape[1] > 2 * 384
        return [read_label(tmp_path / f"out/{file.stem}_ids.png") for file in inputs]

    default = ids([frame, photo], scales=[1, 0.25])
    as_they_are = ids([frame, photo], "--scales", 1, scales=[1, 1])
    assert np.array_equal(default[0], as_they_are[0])
    assert default[1].shape == (256, 384)
    assert (default[1] != as_they_are[1]).mean() > 0.1
    assert np.array_equal(default[1], ids([photo], "--scales", 0.25, scales=[0.25])[0])
    found = sparse_seg.segment(model, photo)
    assert np.array_equal(found.ids(), default[1])
    assert repr(found).endswith("seen at 0.25)")


def test_sub_folders_stay_apart_and_bad_files_are_skipped(checkpoint, photo, tmp_path, capsys):
    """Also one whose name is too long for the file system: for all files, or for the overlay alone."""
    folder, out = tmp_path / "in", tmp_path / "out"
    long = [folder / f"{'z' * length}.png" for length in (240, 251)]
    for file in (folder / "a/x.png", folder / "b/c/x.png", *long):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(photo.read_bytes())
    (folder / "b/bad.jpg").write_bytes(b"\xff\xd8\xff no picture")
    arguments = ["predict", checkpoint, folder, "--out", out, "--ids-only", "--json", tmp_path / "s.json"]
    assert main([*map(str, arguments)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert f"{folder}/b/bad.jpg: truncated, corrupt or not an image" in lines[0]
    assert "its name is too long to write" in lines[1]
    assert lines[1].endswith("as the file system takes 255 bytes; rename it")
    written = {path.relative_to(out).as_posix() for path in out.rglob("*.*")}
    assert written == {"a/x_ids.png", "b/c/x_ids.png", f"{long[0].stem}_ids.png", "classes.yaml"}
    said = json.loads((tmp_path / "s.json").read_text())
    assert len(said["images"]) == 3
    assert list(said["failed"]) == [f"{folder}/b/bad.jpg", str(long[1])]
    assert "_overlay.png" in fails(capsys, "predict", checkpoint, long[0], "--out", out / "all")
    assert not (out / "all").exists(), "nothing of a file whose overlay has too long a name"


def test_a_broken_runtime_is_one_line(predict, config, checkpoint, photo, tmp_path, capsys, monkeypatch):
    arguments = ("predict", checkpoint, photo, "--out", tmp_path / "out", "--runtime")
    monkeypatch.setitem(sys.modules, "openvino", types.ModuleType("openvino"))
    line = fails(capsys, *arguments, "openvino")
    assert "the package openvino is broken (module 'openvino' has no attribute 'Core'); install" in line
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libonnx.so: no such file')")
    (tmp_path / "onnx.py").write_text("raise TypeError('Descriptors cannot be created directly')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("onnx", "onnxruntime")]:
        monkeypatch.delitem(sys.modules, name)
    broken = "error: the package onnxruntime is broken (libonnx.so: no such file); install it again"
    assert fails(capsys, *arguments, "onnxruntime") == broken
    line = fails(capsys, "export", checkpoint, tmp_path / "x.onnx", "--size", "64x64")
    assert "the package onnx is broken (Descriptors cannot be created directly); install it again" in line
    assert fails(capsys, "benchmark", config, "--runtimes", "onnxruntime") == broken
    predict(photo)  # what is not asked for is not needed
    assert "torch (the package onnxruntime is broken (libonnx.so" in capsys.readouterr().out


def test_a_photo_is_turned_upright(predict, model, tmp_path):
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, :48] = 200
    (tmp_path / "p.jpg").write_bytes(sideways_photo(image))
    predict(tmp_path / "p.jpg")
    for kind in ("overlay", "ids", "blocks"):
        assert read_image(tmp_path / f"out/p_{kind}.png").shape == (96, 64, 3)
    found = sparse_seg.segment(model, tmp_path / "p.jpg")
    assert found.image[:40].mean() > 190
    assert found.image[56:].mean() < 10


def test_segment(checkpoint, model, photo):
    """By a file's name, by a network, and by one in a wrapper."""
    found, pixels = sparse_seg.segment(checkpoint, photo), read_image(photo)
    assert found.names == tuple(NAMES)
    assert len(found.colours) == 3
    assert found.classes.dtype == np.uint8
    assert found.classes.shape == found.overlay().shape[:2] == (75, 97)
    assert found.fine_blocks is not None
    assert found.fine_blocks.dtype == bool
    assert found.fine_blocks.shape == (5, 7)
    folded = sparse_seg.segment(model.for_inference(), pixels)
    assert (found.classes == folded.classes).mean() > 0.999
    compiled: Any = torch.compile(model, backend="eager")
    for network in (model, torch.nn.DataParallel(model), AveragedModel(model), compiled):
        again = sparse_seg.segment(network, pixels)
        assert (again.classes == found.classes).all()
        assert again.names == found.names
    for shape in ((64, 64), (0, 60, 3)):
        with pytest.raises(ValueError, match=r"must be \[H, W, 3\] uint8 RGB"):
            sparse_seg.segment(model, np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="expected uint8"):
        sparse_seg.segment(model, np.zeros((64, 64, 3), np.float32))
    others: list[Any] = [torch.nn.Linear(3, 3), torch.nn.DataParallel(torch.nn.Linear(3, 3)), None, 3]
    for nothing in others:
        with pytest.raises(ValueError, match=r"^model must be a checkpoint's path or a network of this pack"):
            sparse_seg.segment(nothing, photo)


def test_segment_takes_a_pillow_image(model, photo, tmp_path):
    pixels = read_image(photo)
    (tmp_path / "sideways.jpg").write_bytes(sideways_photo(pixels))
    files: dict[str, np.ndarray] = {"grey": pixels[..., 0], "clear": np.dstack([pixels, pixels[..., :1]])}
    files["deep"] = pixels[..., 0].astype(np.uint16) * 256
    for name, values in files.items():
        assert cv2.imwrite(str(tmp_path / f"{name}.png"), values)
    for file in (photo, tmp_path / "sideways.jpg", tmp_path / "grey.png", tmp_path / "clear.png"):
        with PIL.Image.open(file) as image:
            opened, read = sparse_seg.segment(model, image), sparse_seg.segment(model, file)
        assert opened.image.shape == read.image.shape
        assert np.abs(opened.image.astype(int) - read.image).max() <= 2, "JPEG decoders round differently"
    deep = r"an image of mode I.* has over 8 bits per channel; give its path"
    with PIL.Image.open(tmp_path / "deep.png") as image, pytest.raises(ValueError, match=deep):
        sparse_seg.segment(model, image)
    assert cv2.imwrite(str(tmp_path / "deep.png"), pixels.astype(np.uint16) * 16)
    deep = r"an image of mode RGB;16B has over 8 bits per channel; give its path"
    with PIL.Image.open(tmp_path / "deep.png") as image, pytest.raises(ValueError, match=deep):
        sparse_seg.segment(model, image)
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:9000])
    cut = r"the image cannot be read: .*; restore it from the original"
    with PIL.Image.open(tmp_path / "cut.png") as image, pytest.raises(DataError, match=cut):
        sparse_seg.segment(model, image)
    for nothing in (torch.zeros(64, 64, 3), None, [[1]]):
        with pytest.raises(ValueError, match=r"^image must be a path, a Pillow image or uint8 \[H, W, 3\]"):
            sparse_seg.segment(model, nothing)


def test_what_was_found_prints_short(model, photo):
    found = sparse_seg.segment(model, photo, Way(fine_fraction=0.2))
    shares = found.shares()
    assert all(type(share) is float for share in shares.values())
    assert sum(shares.values()) == pytest.approx(1)
    first, share = next(iter(shares.items()))
    assert repr(found).startswith(f"Segmentation(75x97 px: {first} {share:.0%}")
    assert repr(found).endswith("; 20% of the blocks fine)")
    dense = sparse_seg.segment(model, photo, Way.dense(8))
    assert dense.fine_blocks is None
    many = replace(dense, classes=np.arange(4, dtype=np.uint8)[None], card=Card.unnamed(4))
    assert repr(many) == "Segmentation(1x4 px: class 0 25%, class 1 25%, class 2 25% and 1 more; dense)"


def test_segment_uses_the_checkpoints_card(checkpoint, model, photo, tmp_path):
    other = replace(load(checkpoint), path=tmp_path / "other.safetensors", mean=(0.1, 0.9, 0.5))
    save(other)
    first, second = (sparse_seg.segment(one, photo) for one in (model, other.path))
    assert (first.classes != second.classes).any(), "its mean"
    fresh = sparse_seg.build_model({"width": 0.125, "head_channels": 16, "num_classes": 4})
    found = sparse_seg.segment(fresh, np.zeros((40, 40, 3), np.uint8))
    assert found.names == ("class 0", "class 1", "class 2", "class 3")
    assert fresh.training
    assert torch.is_grad_enabled()


def test_16_bit_frames_of_a_folder_are_read_alike(predict, model, tmp_path, capsys, caplog):
    """The second has one pixel that 12 bits do not hold; what was taken is said, or told by --bits."""
    frame = np.random.default_rng(0).integers(500, 4000, (64, 64, 3)).astype(np.uint16)
    for name, highest in (("0", 3999), ("1", 4200)):
        frame[0, 0] = highest
        (tmp_path / "in").mkdir(exist_ok=True)
        assert cv2.imwrite(str(tmp_path / f"in/{name}.png"), frame)

    def brightness(*options: object) -> tuple[list[float], str]:
        predict(tmp_path / "in", *options)
        pictures = [read_image(tmp_path / f"out/{name}_blocks.png") for name in "01"]
        return [float(picture.mean()) for picture in pictures], capsys.readouterr().err

    guessed, said = brightness()
    assert abs(guessed[0] - guessed[1]) < 10
    assert "2 of 2 images have 16 bits per channel but no value above 16383, such as 0.png" in said
    assert "read as 16-bit pictures; if they are of another depth, add --bits 10, 12, 14 or 16" in said
    told, said = brightness("--bits", 12)
    assert abs(told[0] - told[1]) < 10
    assert min(told) > max(guessed) + 50
    assert said == ""
    assert cv2.imwrite(str(tmp_path / "a.png"), np.full((64, 64, 3), 3000, np.uint16))
    assert sparse_seg.segment(model, tmp_path / "a.png").image.mean() == 3000 >> 4
    (message,) = caplog.messages
    assert "read as 12-bit pictures; if they are of another depth, set bits" in message
    assert sparse_seg.segment(model, tmp_path / "a.png", bits=16).image.mean() == 3000 >> 8
    assert len(caplog.messages) == 1


@pytest.fixture
def onnx() -> None:
    pytest.importorskip("onnx", reason="needs the package onnx")
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")


def test_segment_runs_in_another_runtime(onnx, model, photo):
    expected, fast = sparse_seg.segment(model, photo), sparse_seg.in_runtime(model, "onnxruntime")
    found = sparse_seg.segment(fast, photo)
    assert (found.classes == expected.classes).mean() > 0.99
    assert found.fine_blocks is not None
    assert (found.fine_blocks == expected.fine_blocks).all()
    seconds = fast.seconds
    assert seconds > 0
    sparse_seg.segment(fast, photo)
    assert fast.seconds == seconds, "its graph is kept"
    dense = sparse_seg.segment(fast, photo, Way.dense(16))
    assert dense.fine_blocks is None


@pytest.mark.slow
def test_another_runtime_gives_the_same_ids(onnx, predict, checkpoint, photo, tmp_path, capsys):
    small, ids = tmp_path / "small.png", {}
    assert cv2.imwrite(str(small), read_image(photo)[:48, :64])
    for runtime in ("torch", "onnxruntime"):
        predict(photo, small, "--runtime", runtime)
        assert f"runtime: {runtime}" in capsys.readouterr().out
        ids[runtime] = [read_label(tmp_path / f"out/{name}_ids.png") for name in ("photo", "small")]
    for found, expected in zip(ids["onnxruntime"], ids["torch"], strict=True):
        assert found.shape == expected.shape
        assert (found == expected).mean() > 0.99
    predict(photo, small, "--runtime", "auto")
    out = capsys.readouterr().out
    assert "runtime: torch (too few images for a graph in onnxruntime)\n" in out
    assert " frames/s in the network\n" in out
    onnxruntime = ("predict", checkpoint, photo, "--out", tmp_path / "out", "--runtime", "onnxruntime")
    line = fails(capsys, *onnxruntime, "--policy", "previous")
    assert line.startswith("error: mask policy previous needs more than the image")
    assert "--steps needs torch, which refines" in fails(capsys, *onnxruntime, "--steps", 0, 0.2, code=2)


@pytest.fixture
def evaluation(config, checkpoint) -> list[object]:
    return ["evaluate", config, checkpoint]


@pytest.mark.slow
def test_evaluation_in_another_runtime(onnx, evaluation, tmp_path, capsys):
    scores = {}
    for runtime in ("torch", "onnxruntime"):
        done(*evaluation, "--json", tmp_path / "out.json", "--runtime", runtime)
        assert f"runtime: {runtime}" in capsys.readouterr().out
        said = json.loads((tmp_path / "out.json").read_text())
        assert said["runtime"] == [runtime]
        scores[runtime] = said["result"]
    assert scores["onnxruntime"]["miou"] == pytest.approx(scores["torch"]["miou"], abs=0.5)
    assert scores["onnxruntime"]["fine_fraction"] == scores["torch"]["fine_fraction"]
    both = ("--runtime", "onnxruntime", "--compare", 0.1, "--accuracy-only")
    assert "--runtime: not with --accuracy-only" in fails(capsys, *evaluation, *both, code=2)


@pytest.mark.slow
def test_a_comparison_in_another_runtime(onnx, evaluation, tmp_path, capsys, monkeypatch):
    """The same rows but for ties and times, also of bounds; which runtime it was is said, and why not."""
    rows, passes, start = {}, list[object](), OnnxSegmentor.start

    def counted(*given: Any) -> Any:
        passes.append(given)
        return start(*given)

    monkeypatch.setattr(OnnxSegmentor, "start", counted)
    compare = [*evaluation, "--compare", 0.2, "--policies", "confidence", "oracle", "oracle:gain", "--json"]
    for runtime, asked in (("torch", "torch"), ("onnxruntime", "auto")):
        done(*compare, tmp_path / f"{runtime}.json", "--runtime", asked)
        assert f"runtime: {runtime}\n" in capsys.readouterr().out
        said = json.loads((tmp_path / f"{runtime}.json").read_text())
        assert said["runtime"] == runtime
        rows[runtime] = said["rows"]
        assert bool(passes) == (runtime == "onnxruntime")
    for one, other in zip(rows["torch"], rows["onnxruntime"], strict=True):
        assert other["miou"] == pytest.approx(one["miou"], abs=0.5)
        for key in ("network", "policy", "fine_fraction", "gmacs", "images"):
            assert other[key] == one[key]
        assert other["milliseconds"] > 0
    resumed = fails(capsys, *compare, tmp_path / "onnxruntime.json", "--resume", "--runtime", "torch")
    assert "or of another runtime" in resumed
    for fraction, policy, reason in (
        (0.2, "previous", "selective, previous, f=0.2: mask policy previous needs more than the image"),
        (0.001, "oracle", "selective, oracle, f=0.001: a graph needs a fine block"),
    ):
        one = [*evaluation, "--compare", fraction, "--policies", policy]
        assert reason in fails(capsys, *one, "--runtime", "onnxruntime")
        done(*one)
        assert f"runtime: torch ({reason}" in capsys.readouterr().out
