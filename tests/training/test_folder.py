"""One training at a time writes a work folder."""

import logging
import os
import socket
from pathlib import Path

import pytest

from sparse_seg.config import load_config
from sparse_seg.errors import DataError, TrainingError
from sparse_seg.training.checkpoint import LOCK
from sparse_seg.training.trainer import Trainer
from tests.training.test_trainer import at_iteration

HERE = f"process {os.getpid()} on {socket.gethostname()}"


def test_a_second_training_is_refused_until_the_first_ends(tiny: Path, tmp_path: Path) -> None:
    """Before its first step, before its first save and after it, with --resume and without; and nothing is
    touched. However it ends, the folder is free."""
    config, run = load_config(tiny, ["train.iterations=4", "train.save_every=2"]), tmp_path / "run"
    first, refused = Trainer(config, run), []

    def try_another() -> None:
        files = {path: path.read_bytes() for path in run.iterdir()}
        for resume in (False, True):
            with pytest.raises(TrainingError) as error:
                Trainer(config, run, resume)
            refused.append(str(error.value))
        assert {path: path.read_bytes() for path in run.iterdir()} == files

    def try_another_and_end() -> None:
        try_another()
        raise KeyboardInterrupt

    try_another()
    at_iteration(first, 1, try_another)
    at_iteration(first, 3, try_another_and_end)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    message = f"{run} is in use: {HERE} trains there; stop it first, or choose another --work-dir"
    assert refused == 6 * [message]
    assert not (run / LOCK).exists()
    for iterations in (4, 5):
        Trainer(load_config(tiny, [f"train.iterations={iterations}"]), run, resume=True).run()


def test_a_training_that_cannot_start_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for is_there in (False, True):
        with pytest.raises(DataError):
            Trainer(load_config(tiny, ["data.root=nowhere"]), run)
        assert run.exists() == is_there
        run.mkdir(exist_ok=True)
    assert list(run.iterdir()) == []


def test_what_a_kill_left_behind_locks_nothing(tiny, tmp_path, caplog):
    run = tmp_path / "run"
    run.mkdir()
    for host, warned in ((socket.gethostname(), False), ("node7", True)):
        (run / LOCK).write_text(f"process 1 on {host}")
        caplog.clear()
        with caplog.at_level(logging.WARNING), pytest.raises(DataError):
            Trainer(load_config(tiny, ["data.root=nowhere"]), run)
        assert ("process 1 on node7 trained in" in caplog.text) == warned
        assert not (run / LOCK).exists()


def test_a_folder_that_cannot_be_locked_is_one_line(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Trainer(load_config(tiny), tmp_path / "file/run")
