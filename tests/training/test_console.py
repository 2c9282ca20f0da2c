"""What a person and a machine read of a training."""

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sparse_seg.config import TrainConfig, changes, load_config
from sparse_seg.data.cityscapes import CITYSCAPES_CLASSES
from sparse_seg.training import console as console_module
from sparse_seg.training.console import Console
from sparse_seg.training.log import TrainingLog
from sparse_seg.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
LINE = (
    r"iteration \d of 6  loss \d\.\d{4}  lr 0\.\d+  \d+\.\d images/s  ETA \d:\d\d:\d\d  peak \d+ MiB"
    r"|iteration \d of 6  mIoU 0\.\d{4}  boundary mIoU 0\.\d{4}  "
    r"validation loss \d\.\d{4}  best mIoU 0\.\d{4}"
)


@pytest.mark.slow
def test_without_a_terminal_there_is_a_line_a_log_step(tiny, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(console_module, "LINE_SECONDS", 0.0)
    Trainer(load_config(tiny), tmp_path / "run").run()
    output, errors = capfd.readouterr()
    lines = output.splitlines()
    assert len(lines) == 6 + 2
    assert all(re.fullmatch(LINE, line) for line in lines), lines
    assert "\r" not in output + errors
    assert errors == ""


def test_lines_are_ten_seconds_apart(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console(TrainConfig(iterations=3600, batch_size=4), 0, torch.device("cpu"))
    for iteration in range(1, 3601):  # an hour
        now[0] += 1
        console.line(iteration, 0.5, 0.01)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("iteration   11 of 3600  loss 0.5000  lr 0.01  4.0 images/s  ETA 0:59:49")
    assert lines[-1].startswith("iteration 3600 of 3600")
    assert sum(len(line) + 1 for line in lines) < 40_000


def test_a_bar_shows_no_best_before_there_is_one(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console(TrainConfig(iterations=9), 0, torch.device("cpu"))
    console.step(0.5, -1.0)
    assert "best" not in str(console.bar.postfix)
    console.step(0.5, 0.25)
    assert "best=0.2500" in str(console.bar.postfix)
    assert "images/s=" in str(console.bar.postfix)
    console.close()


@pytest.mark.slow
def test_a_validation_is_logged_whole(trained):
    lines = map(json.loads, (trained / "log.jsonl").read_text().splitlines())
    *_, line = (line for line in lines if "miou" in line)
    assert list(line["class_iou"]) == list(CITYSCAPES_CLASSES.names)
    known = [iou for iou in line["class_iou"].values() if iou is not None]
    assert sum(known) / len(known) == pytest.approx(line["miou"])
    assert 0 < line["val_loss"] < 10


def test_seconds_go_on_over_a_resume(tmp_path):
    before = [{"iteration": number, "seconds": 100 * number} for number in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
    TrainingLog(tmp_path, 2).write(4, loss=1.0)
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert seconds[:2] == [100, 200]
    assert 200 <= seconds[2] < 210


def test_changed_settings_are_named(tiny):
    old, new = load_config(tiny), load_config(tiny, ["train.lr=0.02", "model.mask.fine_fraction=0.3"])
    assert changes(old, new) == ["model.mask.fine_fraction 0.3 (was 0.15)", "train.lr 0.02 (was 0.01)"]
    assert changes(old, old) == []


@pytest.mark.slow
def test_an_evaluation_without_a_terminal_returns_no_carriage(tiny, trained):
    command = [sys.executable, str(ROOT / "tools/evaluate.py"), str(tiny), str(trained / "best.safetensors")]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "\r" not in done.stdout + done.stderr
