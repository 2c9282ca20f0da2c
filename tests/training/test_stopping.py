"""What ends a training early costs no step, and its one line says what to do."""

import errno
import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import cv2
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
from sparse_seg.training.stopping import AlreadyTrained, DeviceFailed, Stop
from sparse_seg.training.trainer import Trainer
from tests.training.test_trainer import assert_same_run, at_iteration, log_of

RARELY = ["train.save_every=1000"]


def stopped(trainer: Trainer, error: type[SparseSegError] = TrainingError) -> str:
    with pytest.raises(error) as caught:
        trainer.run()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def own_scenes(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "scenes", 10, (64, 96), val_fraction=0.2)
    return tmp_path / "scenes"


@pytest.mark.slow
def test_a_file_damaged_meanwhile_is_named_and_no_step_is_lost(tiny, tmp_path, own_scenes):
    settings = [*RARELY, f"data.root={own_scenes}", "data.workers=2", "train.iterations=100"]
    settings += ["train.eval_every=1000"]
    trainer = Trainer(load_config(tiny, settings), tmp_path / "run")
    labels = sorted(own_scenes.glob("gtFine/train/*/*_labelIds.png"))
    whole = {label: label.read_bytes() for label in labels}

    def damage() -> None:
        for label in labels:
            label.write_bytes(whole[label][:100])

    at_iteration(trainer, 2, damage)
    message = stopped(trainer, DataError)
    assert any(message.startswith(f"{label}: truncated, corrupt") for label in labels)
    reached = load_state(tmp_path / "run/last.pt")["progress"]["iteration"]
    assert 2 <= reached == trainer.iteration
    assert message.endswith(
        f"the last good checkpoint is {tmp_path / 'run/last.pt'}, of iteration {reached}; "
        f"resume with --work-dir {tmp_path / 'run'} --resume"
    )


def kill_workers() -> None:
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device", "log.jsonl")


def poison(trainer: Trainer) -> None:
    step = trainer._step
    trainer._step = lambda images, labels: step(images * float("nan"), labels)  # type: ignore[method-assign]


HINT = r"; the last good checkpoint is \S+last.pt, of iteration %d; %sresume with --work-dir \S+run --resume"
ENDINGS: dict[str, tuple[list[str], Callable, str]] = {
    "SIGTERM": (
        [],
        lambda trainer, patch: os.kill(os.getpid(), signal.SIGTERM),
        r"stopped at iteration 3; resume with --work-dir \S+run --resume",
    ),
    "a worker": (
        ["data.workers=2"],
        lambda trainer, patch: kill_workers(),
        r"a data worker was killed.* lower data.workers" + HINT.replace("%d", r"\d") % "",
    ),
    "the log on a full disk": (
        [],
        lambda trainer, patch: patch.setattr(trainer.report, "write", full_disk),
        r"log.jsonl: No space left on device; make room on the disk" + HINT % (4, ""),
    ),
    "a state on a full disk": (
        ["train.save_every=3"],
        lambda trainer, patch: patch.setattr(trainer_module, "save_state", full_disk),
        r"log.jsonl: No space left on device; make room on the disk" + HINT % (3, ""),
    ),
    "a loss that is not finite": (
        [],
        lambda trainer, patch: poison(trainer),
        "loss is nan at iteration 3" + HINT % (3, "lower train.lr or set train.clip_grad_norm, then "),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("ending", ENDINGS)
def test_what_ends_a_training_costs_no_step(tiny, trained, tmp_path, monkeypatch, ending):
    """It goes on as the unbroken run that all tests share."""
    settings, act, message = ENDINGS[ending]
    config, number = load_config(tiny, [*RARELY, *settings]), signal.SIGTERM
    trainer, before = Trainer(config, tmp_path / "run"), signal.getsignal(number)
    at_iteration(trainer, 1 if ending == "a worker" else 3, lambda: act(trainer, monkeypatch))
    error = DataError if ending == "a worker" else TrainingError
    assert re.fullmatch(message, stopped(trainer, error))
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    Trainer(config, tmp_path / "run", resume=True).run()
    assert_same_run(tmp_path / "run", trained)


@pytest.mark.slow
def test_a_signal_while_validating_is_heard_at_once_and_the_validation_made_up_for(
    tiny, trained, tmp_path, monkeypatch
):
    config = load_config(tiny, RARELY)
    trainer = Trainer(config, tmp_path / "run")
    load, loads = trainer.validation.load, []

    def interrupted(index):
        loads.append(index)
        os.kill(os.getpid(), signal.SIGHUP)
        return load(index)

    monkeypatch.setattr(trainer.validation, "load", interrupted)
    assert stopped(trainer).startswith("stopped at iteration 3; resume with")
    assert len(loads) == 1, "not the whole split"
    assert not any("miou" in line for line in log_of(tmp_path / "run"))
    Trainer(config, tmp_path / "run", resume=True).run()
    assert_same_run(tmp_path / "run", trained)


def test_a_full_disk_before_the_first_save_says_to_start_again(tiny, tmp_path, monkeypatch):
    trainer = Trainer(load_config(tiny, ["train.save_every=1"]), tmp_path / "run")
    monkeypatch.setattr(trainer_module, "save_state", full_disk)
    message = stopped(trainer)
    assert message.endswith("make room on the disk; no checkpoint was written yet; start again")
    monkeypatch.undo()
    Trainer(load_config(tiny, ["train.iterations=1"]), tmp_path / "run").run()  # as it says


def test_advice_within_something_larger_can_be_followed(tiny, tmp_path, monkeypatch):
    step = Trainer._step

    def poisoned(trainer, images, labels):
        return step(trainer, images * (float("nan") if trainer.iteration == 2 else 1), labels)

    monkeypatch.setattr(Trainer, "_step", poisoned)
    advice = f"then run it again to resume, with another config after removing {tmp_path / 'run'}$"
    with pytest.raises(TrainingError, match=advice):
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
    trainer = Trainer(load_config(tiny, ["train.eval_every=1000"]), tmp_path / "run")

    def fail(*arguments):
        raise error

    at_iteration(trainer, 3, lambda: monkeypatch.setattr(trainer.objective, "forward", fail))
    assert re.fullmatch(message, found := stopped(trainer))
    assert f"of iteration {load_state(tmp_path / 'run/last.pt')['progress']['iteration']};" in found


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


ONE = (
    "a batch norm gets one value per channel and learns nothing: raise train.batch_size (2 images for each "
    "process where the head pools them), or else data.crop"
)


@pytest.mark.parametrize(
    ("settings", "trains"),
    [
        (["data.crop=[32,32]", "train.output_stride=32"], False),
        (["data.crop=[32,32]", "model.strides=[8,16,32]", "train.network=selective"], False),
        (["model.head=deeplabv3"], False),
        (["data.crop=[32,32]", "train.output_stride=16"], True),
        (["data.crop=[32,33]", "train.output_stride=32"], True),
        (["model.head=deeplabv3", "train.batch_size=2"], True),
    ],
)
def test_a_batch_norm_needs_two_values_per_channel(tiny, tmp_path, settings, trains):
    settings = ["train.batch_size=1", "train.iterations=1", "train.eval_images=1", *settings]
    settings += ["model.auxiliary=false", "train.ema_decay=null", "model.mask.fine_fraction=0"]
    trainer = Trainer(load_config(tiny, settings), tmp_path / "run")
    if trains:
        trainer.run()
    else:
        assert stopped(trainer) == f"{ONE}; no checkpoint was written yet; start again"


def test_weights_of_zero_are_refused(tiny, tmp_path):
    weights = [0.0] * 16 + [1.0, 0.0, 0.0]  # of trains, which no scene has
    for values in (weights, [0.0] * 19, [1e-300] * 19):
        with pytest.raises(ConfigError, match=r"class_weights are all below .* nothing would be learned"):
            Trainer(load_config(tiny, [f"train.loss.class_weights={values}"]), tmp_path / "run")


def test_train_labels_without_a_class_are_refused_before_training(tiny, tmp_path, own_scenes):
    for label in own_scenes.glob("gtFine/train/*/*_labelIds.png"):
        assert cv2.imwrite(str(label), np.zeros((64, 96), np.uint8))
    with pytest.raises(
        DataError, match="no pixel of 8 labels belongs to a class: their values are 0, all ig"
    ):
        Trainer(load_config(tiny, [f"data.root={own_scenes}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
