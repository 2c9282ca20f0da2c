"""What ends a training early costs no step, and its one line says what to do."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_seg.cli import main
from sparse_seg.config import load_config
from sparse_seg.data.scenes import write_scenes
from sparse_seg.errors import ConfigError, DataError, SparseSegError, TrainingError
from sparse_seg.processes import Processes
from sparse_seg.training import trainer as trainer_module
from sparse_seg.training.checkpoint import load_state
from sparse_seg.training.finish import finish_training
from sparse_seg.training.log import TrainingLog
from sparse_seg.training.stopping import AlreadyTrained, DeviceFailed, Stop
from sparse_seg.training.trainer import Trainer
from tests.training.test_trainer import log_of

RARELY = ["train.save_every=1000", "train.eval_every=1000", "train.iterations=12"]


def at_iteration(trainer: Trainer, iteration: int, act) -> None:
    """Act once the step is done and logged."""
    after_step = trainer._after_step

    def then_act() -> None:
        after_step()
        if trainer.iteration == iteration:
            act()

    trainer._after_step = then_act  # type: ignore[method-assign]


def stopped(trainer: Trainer, error: type[SparseSegError]) -> str:
    with pytest.raises(error) as caught:
        trainer.run()
    message = str(caught.value)
    assert "\n" not in message
    return message


def state_of(folder: Path) -> dict:
    return load_state(folder / "last.pt")


def assert_goes_on_as_unbroken(config, folder: Path, whole: Path) -> None:
    Trainer(config, whole).run()
    Trainer(config, folder, resume=True).run()
    assert log_of(folder) == log_of(whole)
    states = state_of(folder), state_of(whole)
    for kind in ("model", "ema"):
        for name, tensor in states[0][kind].items():
            assert torch.equal(tensor, states[1][kind][name]), name


@pytest.fixture
def own_scenes(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "scenes", 10, (64, 96), val_fraction=0.2)
    return tmp_path / "scenes"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_damaged_meanwhile_is_named_and_no_step_is_lost(tiny, tmp_path, own_scenes, workers):
    settings = [*RARELY, f"data.root={own_scenes}", f"data.workers={workers}", "train.iterations=100"]
    trainer = Trainer(load_config(tiny, settings), tmp_path / "run")
    labels = sorted(own_scenes.glob("gtFine/train/*/*_labelIds.png"))
    whole = {label: label.read_bytes() for label in labels}

    def damage() -> None:
        for label in labels:
            label.write_bytes(whole[label][:100])

    at_iteration(trainer, 2, damage)
    message = stopped(trainer, DataError)
    assert any(message.startswith(f"{label}: truncated, corrupt") for label in labels)
    reached = state_of(tmp_path / "run")["progress"]["iteration"]
    assert 2 <= reached == trainer.iteration
    assert message.endswith(
        f"the last good checkpoint is {tmp_path / 'run/last.pt'}, of iteration {reached}; "
        f"resume with --work-dir {tmp_path / 'run'} --resume"
    )


@pytest.mark.slow
def test_a_killed_worker_is_one_line_and_no_step_is_lost(tiny, tmp_path):
    config = load_config(tiny, [*RARELY, "data.workers=2", "train.iterations=16"])
    trainer = Trainer(config, tmp_path / "run")

    def kill() -> None:
        for worker in multiprocessing.active_children():
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)

    at_iteration(trainer, 3, kill)
    message = stopped(trainer, DataError)
    assert message.startswith("a data worker was killed")
    assert "lower data.workers; the last good checkpoint is" in message
    assert state_of(tmp_path / "run")["progress"]["iteration"] == trainer.iteration >= 3
    assert_goes_on_as_unbroken(config, tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves(tiny, tmp_path, number):
    config = load_config(tiny, RARELY)
    trainer = Trainer(config, tmp_path / "run")
    before = signal.getsignal(number)
    at_iteration(trainer, 3, lambda: os.kill(os.getpid(), number))
    message = stopped(trainer, TrainingError)
    assert message == f"stopped at iteration 3; resume with --work-dir {tmp_path / 'run'} --resume"
    assert signal.getsignal(number) == before
    assert_goes_on_as_unbroken(config, tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_while_validating_is_heard_at_once_and_the_validation_made_up_for(
    tiny, tmp_path, monkeypatch
):
    config = load_config(tiny, ["train.eval_every=2", "train.save_every=1000", "train.iterations=5"])
    trainer = Trainer(config, tmp_path / "run")
    load, loads = trainer.validation.load, []

    def interrupted(index):
        loads.append(index)
        os.kill(os.getpid(), signal.SIGTERM)
        return load(index)

    monkeypatch.setattr(trainer.validation, "load", interrupted)
    assert stopped(trainer, TrainingError).startswith("stopped at iteration 2; resume with")
    assert len(loads) == 1, "not the whole split"
    assert not any("miou" in line for line in log_of(tmp_path / "run"))
    assert_goes_on_as_unbroken(config, tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run/best.safetensors").exists()


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device", "log.jsonl")


@pytest.mark.slow
def test_a_log_on_a_full_disk_costs_no_step(tiny, tmp_path, monkeypatch):
    config = load_config(tiny, [*RARELY, "train.log_every=2"])
    trainer = Trainer(config, tmp_path / "run")
    at_iteration(trainer, 3, lambda: monkeypatch.setattr(trainer.log, "write", full_disk))
    message = stopped(trainer, TrainingError)
    assert message.startswith("log.jsonl: No space left on device; the last good checkpoint is")
    assert f"of iteration 4; make room on the disk, then resume with --work-dir {tmp_path}" in message
    assert_goes_on_as_unbroken(config, tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_saved(tiny, tmp_path, monkeypatch):
    config = load_config(tiny, [*RARELY, "train.save_every=3"])
    trainer = Trainer(config, tmp_path / "run")
    at_iteration(trainer, 4, lambda: monkeypatch.setattr(trainer_module, "save_state", full_disk))
    message = stopped(trainer, TrainingError)
    assert message.count("No space left") == 1
    assert "of iteration 3; make room on the disk, then resume with" in message
    monkeypatch.undo()
    assert_goes_on_as_unbroken(config, tmp_path / "run", tmp_path / "whole")


def test_a_full_disk_before_the_first_save_says_to_start_again(tiny, tmp_path, monkeypatch):
    trainer = Trainer(load_config(tiny, ["train.save_every=1"]), tmp_path / "run")
    monkeypatch.setattr(trainer_module, "save_state", full_disk)
    message = stopped(trainer, TrainingError)
    assert message.endswith("no checkpoint was written yet; make room on the disk, then start again")
    monkeypatch.undo()
    Trainer(load_config(tiny, ["train.iterations=1"]), tmp_path / "run").run()  # as it says


def poison(trainer: Trainer, iteration: int) -> None:
    step = trainer._step

    def poisoned(images, labels):
        return step(images * (float("nan") if trainer.iteration == iteration else 1), labels)

    trainer._step = poisoned  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_costs_no_step(tiny, tmp_path):
    config = load_config(tiny, RARELY)
    trainer = Trainer(config, tmp_path / "run")
    poison(trainer, 3)
    message = stopped(trainer, TrainingError)
    assert message.startswith("loss is nan at iteration 3; the last good checkpoint is")
    assert message.endswith(
        "of iteration 3; lower train.lr or set train.clip_grad_norm, then resume with --work-dir "
        f"{tmp_path / 'run'} --resume"
    )
    assert_goes_on_as_unbroken(config, tmp_path / "run", tmp_path / "whole")


def test_advice_within_something_larger_can_be_followed(tiny, tmp_path, monkeypatch):
    step = Trainer._step

    def poisoned(trainer, images, labels):
        return step(trainer, images * (float("nan") if trainer.iteration == 2 else 1), labels)

    monkeypatch.setattr(Trainer, "_step", poisoned)
    with pytest.raises(TrainingError, match=f"then remove {tmp_path / 'run'} and run it again$"):
        finish_training(load_config(tiny), tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
            r"no memory for a step; lower train.batch_size or data.crop; the last good .* of iteration 3; .*",
        ),
        (  # what it held is lost: nothing is saved from there
            torch.AcceleratorError("CUDA error: an illegal instruction was encountered\nSearch for it"),
            r"the GPU failed: .* illegal[^\n]*; the last good .*last.pt, of iteration 2; resume .*",
        ),
    ],
    ids=["memory", "gpu"],
)
def test_a_step_without_memory_or_gpu_is_one_line(error, message, tiny, tmp_path, monkeypatch):
    trainer = Trainer(load_config(tiny), tmp_path / "run")

    def fail(*arguments):
        raise error

    at_iteration(trainer, 3, lambda: monkeypatch.setattr(trainer.objective, "forward", fail))
    assert re.fullmatch(message, stopped(trainer, TrainingError))
    assert f"of iteration {state_of(tmp_path / 'run')['progress']['iteration']};" in message


@pytest.mark.parametrize(
    ("text", "is_the_gpus"),
    [
        ("merge_sort: failed to synchronize: cudaErrorIllegalInstruction: an illegal", True),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED after an illegal instruction", True),
        ("a fault of ours", False),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_errors_that_are_not_the_gpus_keep_their_traceback(text, is_the_gpus):
    stop = Stop(Processes(), torch.device("cpu"))

    def fail():
        raise RuntimeError(text)

    with nullcontext() if is_the_gpus else pytest.raises(RuntimeError, match=text):
        assert stop.attempt(fail) is None
    assert isinstance(stop.failure, DeviceFailed) == is_the_gpus


def test_a_finished_run_resumed_exits_0_and_says_so(tiny, trained, tmp_path, capsys):
    written = (trained / "last.pt").stat().st_mtime_ns
    arguments = ["train", str(tiny), "--work-dir", str(trained), "--set", "data.root=not_needed", "--resume"]
    assert main(arguments) == 0
    assert (
        "run is already trained to iteration 6; raise train.iterations to continue" in capsys.readouterr().out
    )
    assert (trained / "last.pt").stat().st_mtime_ns == written
    with pytest.raises(TrainingError, match="already trained to iteration 6") as caught:
        Trainer(load_config(tiny), tmp_path / "new", trained / "last.pt")
    assert not isinstance(caught.value, AlreadyTrained), "the new folder holds no trained network"


def test_a_finished_run_without_its_best_makes_up_for_it(tiny, trained, tmp_path):
    shutil.copy(trained / "last.pt", tmp_path)
    best = log_of(trained)[-1]["miou"]  # of its end
    assert Trainer(load_config(tiny), tmp_path, resume=True).run() == best
    assert (tmp_path / "best.safetensors").exists()


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
def test_a_damaged_log_does_not_stop_resuming(tmp_path, caplog, damage):
    lines = [json.dumps({"iteration": number}).encode() + b"\n" for number in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_bytes(b"".join(lines[:2]) + damage)
    TrainingLog(tmp_path, 2).write(4, loss=1.0)
    assert [line["iteration"] for line in log_of(tmp_path)] == [1, 2, 4]
    assert bool(caplog.messages) == bool(damage.strip())


@pytest.mark.parametrize(
    ("settings", "count", "cause"),
    [
        (["data.crop=[32,32]", "train.output_stride=32", "train.batch_size=1"], 1, "one cell at stride 32"),
        (["data.crop=[32,32]", "train.output_stride=32"], 2, "one cell at stride 32"),
        (["model.head=deeplabv3"], 2, "deeplabv3 pools each image to one value"),
        (
            ["data.crop=[32,32]", "model.strides=[8,16,32]", "train.network=selective", "train.batch_size=1"],
            1,
            "one cell at stride 32",
        ),
    ],
)
def test_one_value_per_channel_is_refused_before_data_is_read(tiny, tmp_path, settings, count, cause):
    config = load_config(tiny, [*settings, "data.root=nowhere"])
    with pytest.raises(ConfigError, match=cause):
        Trainer(config, tmp_path / "run", processes=Processes(0, count))


@pytest.mark.parametrize(
    "settings",
    [
        ["data.crop=[32,32]", "train.output_stride=16", "train.batch_size=1"],
        ["data.crop=[32,33]", "train.output_stride=32", "train.batch_size=1"],
        ["data.crop=[32,32]", "train.output_stride=32"],
        ["model.head=deeplabv3"],
    ],
)
def test_two_values_per_channel_train(tiny, tmp_path, settings):
    overrides = [*settings, "train.iterations=1", "train.ema_decay=null", "model.auxiliary=false"]
    Trainer(load_config(tiny, overrides), tmp_path / "run").run()


def test_weights_of_zero_are_refused(tiny, tmp_path):
    weights = [0.0] * 16 + [1.0, 0.0, 0.0]  # of trains, which no scene has
    for values in (weights, [0.0] * 19):
        with pytest.raises(ConfigError, match=r"class_weights"):
            Trainer(load_config(tiny, [f"train.loss.class_weights={values}"]), tmp_path / "run")


@pytest.mark.slow
def test_train_labels_without_a_class_are_refused_before_training(tiny, tmp_path, own_scenes):
    import cv2

    for label in own_scenes.glob("gtFine/train/*/*_labelIds.png"):
        assert cv2.imwrite(str(label), np.zeros((64, 96), np.uint8))
    with pytest.raises(
        DataError, match="no pixel of 8 labels belongs to a class: their values are 0, all ig"
    ):
        Trainer(load_config(tiny, [f"data.root={own_scenes}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_one_damaged_file_stops_all_processes(tiny, tmp_path, own_scenes):
    """The process that does not read it saves, and neither waits for the other."""
    script = tmp_path / "go.py"
    script.write_text(
        f"""
import sys, torch
from pathlib import Path
from sparse_seg.config import load_config
from sparse_seg.errors import DataError, TrainingError
from sparse_seg.processes import joined_processes
from sparse_seg.training.trainer import Trainer
config = load_config({str(tiny)!r}, {[*RARELY, f"data.root={own_scenes}"]!r})
with joined_processes(torch.device("cpu")) as (processes, device):
    trainer = Trainer(config, {str(tmp_path / "run")!r}, False, device, processes)
    if not processes.is_first:
        load = trainer.dataset.load
        def refuse(index):
            if trainer.iteration == 2:
                raise DataError("label.png: damaged")
            return load(index)
        trainer.dataset.load = refuse
    try:
        trainer.run()
    except (DataError, TrainingError) as error:
        Path({str(tmp_path)!r}, f"says{{processes.rank}}").write_text(str(error))
"""
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    says = [(tmp_path / f"says{rank}").read_text() for rank in (0, 1)]
    assert says[0] == says[1], "the first process speaks for all"
    assert says[0].startswith("label.png: damaged; the last good checkpoint is")
    assert state_of(tmp_path / "run")["progress"]["iteration"] == 2
