"""What a person and a machine read of a training."""

import io
import json
import re
import sys
import time

import pytest
import torch

from sparse_seg.cli import main
from sparse_seg.config import TrainConfig, changes, load_config
from sparse_seg.data.cityscapes import CITYSCAPES_CLASSES
from sparse_seg.training import report as report_module
from sparse_seg.training.report import TrainingReport
from sparse_seg.training.trainer import Trainer
from tests.training.test_trainer import log_of

LINE = (
    r"iteration \d of 6  loss \d\.\d{4}  lr 0\.\d+  \d+\.\d images/s  ETA \d:\d\d:\d\d  peak \d+ MiB"
    r"|iteration \d of 6  mIoU 0\.\d{4}  boundary mIoU 0\.\d{4}  "
    r"validation loss \d\.\d{4}  best mIoU 0\.\d{4}"
)


def report(folder, iteration=0, **settings) -> TrainingReport:
    return TrainingReport(TrainConfig(**settings), folder, iteration, torch.device("cpu"))


@pytest.mark.slow
def test_without_a_terminal_there_are_lines_and_a_log_of_whole_validations(
    tiny, tmp_path, monkeypatch, capfd
):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(report_module, "LINE_SECONDS", 0.0)
    Trainer(load_config(tiny, ["train.tensorboard=true"]), tmp_path).run()
    weights = str(tmp_path / "best.safetensors")
    output, errors = capfd.readouterr()
    assert main(["evaluate", str(tiny), weights, "--device", "cpu"]) == 0
    assert "\r" not in output + "".join(capfd.readouterr())
    assert errors == ""
    lines = output.splitlines()
    assert len(lines) == 6 + 2
    assert all(re.fullmatch(LINE, line) for line in lines), lines

    *_, line = (line for line in log_of(tmp_path) if "miou" in line)
    assert list(line["class_iou"]) == list(CITYSCAPES_CLASSES.names)
    known = [iou for iou in line["class_iou"].values() if iou is not None]
    assert sum(known) / len(known) == pytest.approx(line["miou"])
    assert 0 < line["val_loss"] < 10

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "lr", "miou"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_lines_are_ten_seconds_apart(tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    told = report(tmp_path, iterations=3600, batch_size=4)
    for iteration in range(1, 3601):  # an hour
        now[0] += 1
        told.loss(iteration, 0.5, 0.01)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("iteration   11 of 3600  loss 0.5000  lr 0.01  4.0 images/s  ETA 0:59:49")
    assert lines[-1].startswith("iteration 3600 of 3600")
    assert sum(len(line) + 1 for line in lines) < 40_000


def test_a_bar_shows_no_best_before_there_is_one(tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    told = report(tmp_path, iterations=9)
    told.step(0.5, -1.0)
    assert "best" not in str(told.bar.postfix)
    told.step(0.5, 0.25)
    assert "best=0.2500" in str(told.bar.postfix)
    assert "images/s=" in str(told.bar.postfix)
    told.close()


@pytest.mark.parametrize(
    "damage",
    [
        b"\n",
        b'{"iteration": 2, "se',
        b"[]\n",
        b'{"iteration": null}\n',
        b"\xff\xfe\n",
        b'{"loss": 1}\n',
        b"[" * 9999,
    ],
)
def test_a_log_goes_on_after_a_resume(tmp_path, caplog, damage):
    """Without what came after the state that is resumed, and what is damaged."""
    before = [{"iteration": number, "seconds": 100 * number} for number in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in before)
    (tmp_path / "log.jsonl").write_bytes(text.encode() + damage)
    report(tmp_path, 2).write(4, miou=None)
    *kept, last = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert kept == before[:2]
    assert 200 <= last.pop("seconds") < 210
    assert last == {"iteration": 4, "miou": None}
    assert bool(caplog.messages) == bool(damage.strip())


def test_changed_settings_are_named(tiny):
    old, new = load_config(tiny), load_config(tiny, ["train.lr=0.02", "model.mask.fine_fraction=0.3"])
    assert changes(old, new) == ["model.mask.fine_fraction 0.3 (was 0.15)", "train.lr 0.02 (was 0.01)"]
    assert changes(old, old) == []
