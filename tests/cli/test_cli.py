"""The command lines as a user meets them: help, exit codes, messages, files."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch

from sparse_seg.cli import COMMANDS, demo, main
from sparse_seg.data.dataset import read_image
from sparse_seg.lab.compare import report
from sparse_seg.lab.report.overlays import GAP, LEGEND_HEIGHT
from tests import captured
from tests.cli.commands import done, fails

ROOT = Path(__file__).parents[2]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def trained(config, checkpoint) -> tuple[Path, Path]:
    return config, checkpoint


def test_help_has_examples_and_the_overview_purposes(capsys):
    for command in (*COMMANDS, ""):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"] if command else ["--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert command.replace("_", "-") in text
        assert not command or re.search(r"examples?:\n", text), command
    for name in COMMANDS:
        assert re.search(rf"^  {name.replace('_', '-')} +[A-Z].*\.$", text, re.MULTILINE), name
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("predikt a.png", "argument COMMAND: invalid choice: 'predikt'; did you mean 'predict'?"),
        ("--versoin", "unrecognized arguments: --versoin; did you mean '--version'?"),
        ("predict camvid-slim a.png --outt o", "unrecognized arguments: --outt; did you mean '--out'?"),
        ("convert a b --mean -1 0 0 --std", "argument --std: expected 3 arguments"),
        ("predict camvid-slim - --set a=-b", "required: --out"),
        ("export camvid-slim x --siz=64x64", "unrecognized arguments: --siz; did you mean '--size'?"),
        ("browse --nothing-like-it", "error: unrecognized arguments: --nothing-like-it"),
        ("predict a b --out o --policy confidense", "'confidense'; did you mean 'confidence'? Choose one of"),
        ("evaluate a b --runtime torhc", "invalid choice: 'torhc'; did you mean 'torch'? Choose one of auto"),
        ("evaluate a b --dense 8.0", "argument --dense: '8.0' is not a whole number from 1"),
    ],
)
def test_what_is_misspelt(capsys, command, complaint):
    line = fails(capsys, *command.split(), code=2)
    assert complaint in line
    if "nothing" in command:
        assert line.endswith(complaint)


def test_misspelt_weights(capsys, tmp_path):
    line = fails(capsys, "export", "camvid-slimm", tmp_path / "x.onnx", "--size", "64x64")
    assert line.endswith("name a file, or one of camvid-slim, street-lite0; did you mean 'camvid-slim'?")
    line = fails(capsys, "convert", ROOT / "setup.cfg", tmp_path / "x.safetensors", "--classes", "cityscape")
    assert "unknown classes 'cityscape'; did you mean 'cityscapes'? Choose one of voc, " in line


def test_every_tool_is_a_command():
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")}
    assert tools == set(COMMANDS)
    for name in COMMANDS:
        assert f'main(["{name}", *sys.argv[1:]])' in (ROOT / f"tools/{name}.py").read_text()


def test_usage_errors(capsys, trained):
    config, checkpoint = trained
    evaluate, values = (
        ("evaluate", config, checkpoint),
        {"--compare": 0.1, "--fine-fraction": 0.1, "--dense": 8},
    )
    folder, best = checkpoint.parent, checkpoint
    module = ("convert", best, "net.safetensors", "--module", captured.NAME)
    predict = ("predict", best, ROOT / "README.md", "--out", "o", "--dense", 8)
    export = ("export", best, "x.onnx", "--size", "64x64", "--dense", 8)
    for arguments, complaint in (
        ((), "COMMAND"),
        (("train",), "CONFIG"),
        ((*evaluate, "--fine-fraction", "1.5"), "must be a number from 0 to 1, not '1.5'"),
        ((*evaluate, "--device", "tpuu"), "unknown device 'tpuu'"),
        ((*evaluate, "--report", "r.html"), "--report: only with --compare"),
        ((*evaluate, "--policies", "edge"), "--policies: only with --compare"),
        ((*evaluate, "--compare", 0.1, "--resume"), "--resume: name the file"),
        ((*evaluate, "--json", folder), "is a folder; name a file in it"),
        ((*evaluate, "--compare", 0.1, "--report", folder), "is a folder; name a file in it"),
        (("benchmark", config, "--size", "16x64"), "must be at least 32 px"),
        (("benchmark", config, "--engines", "cudnn"), "invalid choice: 'cudnn'"),
        (("evaluate", best, config), f"argument CONFIG: {best} is a checkpoint, not a config"),
        (("predict", best, config, "a.png", "--out", "o"), f"argument CONFIG: {best} is a checkpoint, not a"),
        (("train", best.with_name("last.pt")), "is a checkpoint, not a config"),
        (("predict", best, "--out", "o"), "required: CHECKPOINT, INPUT"),
        (
            ("predict", best, "a.png", "--set", "model.exchange=none", "--out", "o"),
            "--set: overrides a config",
        ),
        (("predict", best, "a.png", "--out", best), "best.safetensors is a file; name a folder"),
        (("predict", best, "a.png", "--policy", "oracle:gain", "--out", "o"), "oracle:gain reads labels"),
        (("predict", best, "a.png", "--window", 9, "--out", "o"), "windows of 9 px are too small; use 256"),
        (("convert", "a.pth", "net.pth"), "must end in .safetensors"),
        (("convert", "a.pth", "net.safetensors", "--to-dense", "--verify"), "--verify: not with --to-dense"),
        (("convert", best, best), "argument DST: is SRC"),
        (("convert", "a.pth", "net.safetensors", "--output-stride", 32), "invalid choice"),
        (("convert", "a.pth", "net.safetensors", "--from", "keras"), "invalid choice"),
        ((*module, "--from", "timm"), "argument --from: not with --module"),
        ((*module, "--args", "classes"), "'classes' is no KEY=VALUE"),
        ((*module[:3], "--args", "classes=3"), "argument --args: only with --module"),
        (("make-scenes", "o", "--size=256"), "HEIGHTxWIDTH"),
        (("make-scenes", "o", "--size=0x48"), "HEIGHTxWIDTH"),
        (("make-scenes", "o", "--size=16x48"), "at least 32 px"),
        (("make-scenes", "o", "--count=1"), "whole number from 2"),
        (("make-scenes", "o", "--seed=-1"), "whole number from 0"),
        ((*evaluate, "--dense", 9), "argument --dense: output_stride must be 4, 8, 16 or 32, not 9"),
        ((*predict, "--policy", "edge"), "argument --policy: not allowed with argument --dense"),
        ((*export, "--policy", "edge"), "argument --policy: not allowed with argument --dense"),
        ((*export, "--merge", "patch"), "argument --merge: not allowed with argument --dense"),
    ):
        assert complaint in fails(capsys, *arguments, code=2)
    for one, other in itertools.combinations(values, 2):
        complaint = fails(capsys, *evaluate, one, values[one], other, values[other], code=2)
        assert f"argument {other}: not allowed with argument {one}" in complaint
    if not torch.cuda.is_available():
        assert "no CUDA device" in fails(capsys, "train", config, "--device", "cuda", code=2)


def test_failures_are_one_line(capsys, trained, tmp_path):
    """And what is wrong with a checkpoint is told before what is wrong with data."""
    config, checkpoint = trained
    evaluate = ("evaluate", config, checkpoint)
    predict = ("predict", config, checkpoint, tmp_path, "--out", tmp_path)
    camvid = ("--set", "data.dataset=camvid", "model.num_classes=19")
    wrong = ("--set", "data.dataset=scenes", "data.root=nowhere")
    spconv = ("--set", "model.engine=spconv", "--set", "train.network=selective")
    for arguments, complaint in (
        (("train", config.with_name("owm.yaml")), "did you mean 'own.yaml'"),
        (("predict", config, checkpoint, tmp_path / "no.png", "--out", tmp_path), "no such file"),
        (predict, "no image in this folder"),
        (("evaluate", config, tmp_path / "no.pt"), "does not exist"),
        ((*evaluate, "--set", "data.root=nowhere"), "nowhere: no such folder; set data.root"),
        ((*evaluate, "--set", "model.width=0.25"), "does not fit"),
        ((*evaluate, *wrong), "has 3 classes, but 19 are asked for"),
        ((*evaluate, *wrong, "--compare", 0.1), "has 3 classes, but 19 are asked for"),
        ((*evaluate, *camvid), "model.num_classes is 19 but camvid has 11 classes"),
        ((*predict, *camvid), "model.num_classes is 19 but camvid has 11 classes"),
        ((*evaluate, "--split", "vall"), "no such folder"),
        (("train", config, *spconv), "engine: gather"),
        (("train", config, "--work-dir", checkpoint.parent), "already holds a run"),
        (("benchmark", config, "--checkpoint", tmp_path / "no.pt", "--size", "64x96"), "does not exist"),
    ):
        assert complaint in fails(capsys, *arguments), arguments
    for key, near in (("train.lrr", "'train.lr'"), ("train.lossy.fine_weight", "did"), ("train.foo", "")):
        assert ("did you mean" in (line := fails(capsys, "train", config, "--set", f"{key}=1"))) == bool(near)
        assert near in line
    assert "did you mean" not in fails(capsys, "train", config.with_name("camvid.yaml"))
    picture = tmp_path / "photo.JPG"
    picture.write_bytes(b"\xff\xd8\xff")
    line = fails(capsys, "predict", picture, checkpoint, "--out", tmp_path / "out")
    assert "photo.JPG is a picture, no checkpoint; name one (to predict, before the pictures)" in line
    for head in ("deeplabv3", "deeplabv3plus"):
        pooled = ("--scopes", "train", "--set", f"model.head={head}")
        line = fails(capsys, "benchmark", config, "--size", "64x96", "--no-memory", *pooled)
        assert "needs --batch 2 or more: a norm sees one vector of each image" in line


def test_system_errors_are_one_line(capsys, monkeypatch, trained):
    for error, line in (
        (OSError("disk full"), "error: disk full"),
        (OSError(28, "No space left", "a.json"), "error: a.json: No space left"),
    ):
        monkeypatch.setattr("sparse_seg.cli.train.load_config", Mock(side_effect=error))
        assert fails(capsys, "train", trained[0]) == line


def test_class_names_on_a_terminal_without_their_letters(trained, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    done("evaluate", *trained, "--dense", 16)
    terminal.seek(0)
    assert "Stra?e " in terminal.read()


@pytest.mark.slow
def test_a_program_with_closed_streams(trained, tmp_path):
    """As some schedulers and service managers start a job."""
    command = f"{sys.executable} -m sparse_seg train {trained[0]} --work-dir {tmp_path}/run <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=ROOT, env=ONE_THREAD).returncode == 0
    assert (tmp_path / "run/best.safetensors").is_file()


def test_evaluate_prints_and_writes(capsys, trained, tmp_path):
    done("evaluate", *trained, "--json", tmp_path / "out.json", "--fine-fraction", 0.5)
    out = capsys.readouterr().out
    assert re.search(r"mIoU \d+\.\d\d  boundary mIoU .*fine fraction 0\.500; 2 images", out)
    assert re.search(r"^wall +", out, re.M)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["result"]["fine_fraction"] == 0.5
    assert {"command", "commit", "machine", "threads", "date"} <= set(written)
    done("evaluate", *trained, "--dense", 8)
    assert "(dense;" in capsys.readouterr().out


@pytest.mark.slow
def test_comparison_goes_on(capsys, trained, tmp_path, monkeypatch):
    """--resume keeps the rows there are and measures the others, policy by policy."""
    out = tmp_path / "rows.json"
    compare = ["evaluate", *trained, "--compare", 0.5, "--json", out, "--resume", "--runtime", "torch"]
    done(*compare, "--policies", "random")
    before = json.loads(out.read_text())["rows"]
    measured: list[str] = []
    whole = report.compare

    def note(model, dataset, data, rows, *others, **options):
        measured.extend(row.name for row in rows)
        return whole(model, dataset, data, rows, *others, **options)

    monkeypatch.setattr(report, "compare", note)
    done(*compare, "--policies", "random", "edge:cad", "--exchange", "none", "linear")
    names = [
        f"selective, {spec}, f=0.5, {rule}" for spec in ("random", "edge:cad") for rule in ("none", "linear")
    ]
    assert measured == names
    result = json.loads(out.read_text())
    assert result["rows"][: len(before)] == before
    assert result["commits"] == [str(result["commit"])]
    assert "edge:cad, f=0.5, linear" in capsys.readouterr().out
    other = fails(capsys, *compare, "--limit", 1)
    assert "holds rows of other weights, images, strides or rules, or of another runtime" in other
    other = fails(capsys, *compare, "--set", "model.mask.reduce=mean")
    assert "holds rows of other weights, images, strides or rules" in other
    assert json.loads(out.read_text()) == result
    out.write_text("{}")
    assert "holds no comparison to resume" in fails(capsys, *compare)
    wrong = fails(capsys, *compare, "--policies", "edge:canny", code=2)
    assert "mask policy 'edge:canny': unknown option 'canny'; choose one of blur, sobel, cad" in wrong
    assert "this network has no learned mask" in fails(capsys, *compare[:5], "--policies", "learned")


def test_predict_writes_pictures(capsys, trained, tmp_path, caplog):
    """Of every kind, for the images of a folder; what else is there is told."""
    frames, out = tmp_path / "frames", tmp_path / "out"
    frames.mkdir()
    image = np.random.default_rng(0).integers(0, 256, (75, 97, 3), np.uint8)
    for name in ("a.png", "b.jpg"):
        cv2.imwrite(str(frames / name), image)
    (frames / "notes.txt").write_text("no image")
    predict = ["predict", *trained, frames, "--out"]
    done(*predict, out, "--show-levels", "--steps", 0, 0.1, 0.5)
    assert not capsys.readouterr().err, "no bar without a terminal"
    assert "1 of 3 files are left out, such as notes.txt; names end in .avi, " in caplog.text
    shapes = dict.fromkeys(("blocks", "classes", "ids", "overlay"), (75, 97, 3))
    shapes["levels"] = (75 + LEGEND_HEIGHT, 97, 3)
    for stem, (kind, shape) in itertools.product("ab", shapes.items()):
        assert read_image(out / f"{stem}_{kind}.png").shape == shape
        assert read_image(out / f"{stem}_steps.png").shape[1] == 3 * 97 + 2 * GAP
    assert len(list(out.iterdir())) == 2 * 6 + 2, "and classes.yaml and legend.png"
    kept = sorted(frames.iterdir())
    message = fails(capsys, *predict, frames, code=2)
    assert f"{frames} holds the images; name another folder than {frames}" in message
    assert sorted(frames.iterdir()) == kept
    assert "fractions must rise" in fails(capsys, *predict, out, "--steps", "0.5", "0.1", code=2)
    done(*predict, tmp_path / "d", "--dense", 8)
    assert len(list((tmp_path / "d").iterdir())) == 2 * 3 + 2


def test_predict_refuses_bad_images_and_writes_nothing_for_them(capsys, trained, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "broken.png").write_bytes(b"not an image")
    cv2.imwrite(str(tmp_path / "small.png"), np.zeros((12, 12, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "other/small.jpg"), np.zeros((40, 40, 3), np.uint8))
    out = tmp_path / "out"
    for images, complaint in (
        (("broken.png",), "broken.png: truncated, corrupt or not an image"),
        (("small.png",), "small.png: images must be at least 32 px at a scale of 2"),
        (("small.png", "other"), "would write to the same pictures"),
    ):
        files = [tmp_path / image for image in images]
        assert complaint in fails(capsys, "predict", *trained, *files, "--out", out)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.slow
def test_demo_in_small(capsys, tmp_path, monkeypatch):
    """From any folder, and into one whose name would not be valid YAML."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "comparison_runtime", lambda *given: (None, ""))
    arguments = ["demo", "--out", "a: [demo", "--count", 10, "--device", "cpu", "--set"]
    arguments += ["train.iterations=2", "model.width=0.125", "train.batch_size=2", "data.crop=[64, 64]"]
    monkeypatch.setattr(demo, "FRACTIONS", (0.3,))
    done(*arguments, "train.warmup_iterations=0")
    first = capsys.readouterr().out
    assert "dense OS8" in first
    assert "minutes" in first.splitlines()[0]
    assert all((tmp_path / "a: [demo" / name).exists() for name in ("report.html", "picture.png"))
    monkeypatch.setattr(demo, "compare_and_report", lambda *given: None)
    done(*arguments, "train.warmup_iterations=0")  # a second run reuses scenes and weights
    assert "best validation" not in capsys.readouterr().err


def test_demo_says_what_it_lacks(capsys, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparse_seg.cli.demo.write_scenes", interrupt)
    assert "interrupted; run it again to resume" in fails(capsys, "demo", "--out", tmp_path)
    monkeypatch.setattr("sparse_seg.__file__", str(tmp_path / "package/__init__.py"))
    assert "is not there: run from a checkout" in fails(capsys, "demo", "--out", tmp_path)
