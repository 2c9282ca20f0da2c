"""One training at a time writes a work folder."""

import json
import logging
import os
import socket
from pathlib import Path

import pytest
import torch

from sparse_seg.config import load_config
from sparse_seg.errors import DataError, TrainingError
from sparse_seg.files import locked
from sparse_seg.training.folder import LOCK
from sparse_seg.training.trainer import Trainer
from tests.training.kills import make_checkout, start_job
from tests.training.test_stopping import at_iteration

HERE = f"process {os.getpid()} on {socket.gethostname()}"


def test_a_second_training_is_refused_while_the_first_runs(tiny: Path, tmp_path: Path) -> None:
    """Before its first save and after it, with --resume and without; and nothing is touched."""
    config, run = load_config(tiny, ["train.iterations=4", "train.save_every=2"]), tmp_path / "run"
    first, refused = Trainer(config, run), []

    def try_another() -> None:
        files = {path: path.read_bytes() for path in run.iterdir()}
        for resume in (False, True):
            with pytest.raises(TrainingError) as error:
                Trainer(config, run, resume)
            refused.append(str(error.value))
        assert {path: path.read_bytes() for path in run.iterdir()} == files

    at_iteration(first, 1, try_another)
    at_iteration(first, 3, try_another)
    first.run()
    message = f"{run} is in use: {HERE} trains there; stop it first, or choose another --work-dir"
    assert refused == 4 * [message]
    assert not (run / LOCK).exists()
    Trainer(load_config(tiny, ["train.iterations=5"]), run, resume=True).run()


def test_of_two_trainings_that_begin_together_one_runs(tiny: Path, tmp_path: Path) -> None:
    config, run = load_config(tiny, ["train.iterations=1"]), tmp_path / "run"
    first, second = Trainer(config, run), Trainer(config, run)
    with pytest.raises(TrainingError, match=r"another training has begun in .*run meanwhile"):
        first.run()
    second.run()
    assert [json.loads(line)["iteration"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 1]


def test_a_folder_that_another_training_makes_meanwhile(tiny, tmp_path, monkeypatch):
    """It was not there when both looked."""
    config, run = load_config(tiny), tmp_path / "run"
    check = Trainer._check_folder

    def made_meanwhile(trainer: Trainer, goes_on: bool) -> None:
        check(trainer, goes_on)
        monkeypatch.setattr(Trainer, "_check_folder", check)
        Trainer(config, run).run()

    monkeypatch.setattr(Trainer, "_check_folder", made_meanwhile)
    with pytest.raises(TrainingError, match="already holds a run"):
        Trainer(config, run)


def test_a_training_that_cannot_start_leaves_no_lock(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(DataError):
        Trainer(load_config(tiny, ["data.root=nowhere"]), run)
    assert not run.exists()
    run.mkdir()
    with pytest.raises(DataError):
        Trainer(load_config(tiny, ["data.root=nowhere"]), run)
    assert list(run.iterdir()) == []


def test_what_a_kill_left_behind_locks_nothing(tiny, tmp_path, caplog):
    run = tmp_path / "run"
    run.mkdir()
    for host, warned in ((socket.gethostname(), False), ("node7", True)):
        (run / LOCK).write_text(f"process 1 on {host}")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            Trainer(load_config(tiny), run)
        assert ("process 1 on node7 trained in" in caplog.text) == warned
        assert not (run / LOCK).exists()


def test_a_folder_that_cannot_be_locked_is_one_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Trainer(load_config(tiny), tmp_path / "file/run")


@pytest.mark.slow
def test_a_job_of_several_processes_is_refused_in_one_line(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path)
    with locked(checkout / "run" / LOCK) as free:
        assert free
        _, errors = (job := start_job(checkout, "train.iterations=2")).communicate(timeout=120)
    assert job.returncode == 1
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == [
        f"error: run is in use: {HERE} trains there; stop it first, or choose another --work-dir"
    ]
    assert list((checkout / "run").iterdir()) == []


def test_an_interrupted_run_frees_the_folder(tiny: Path, tmp_path: Path) -> None:
    trainer = Trainer(load_config(tiny), tmp_path / "run")

    def interrupted(images: torch.Tensor, labels: torch.Tensor) -> float:
        raise KeyboardInterrupt

    trainer._step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert not (tmp_path / "run" / LOCK).exists()
