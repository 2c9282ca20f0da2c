"""What ends a training early costs no step, and its one line says what to do."""

import errno
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from sparse_seg.config import load_config
from sparse_seg.errors import DataError, SparseSegError, TrainingError
from sparse_seg.training import trainer as trainer_module
from sparse_seg.training.trainer import Trainer
from tests.fast import one_fast
from tests.training.test_trainer import assert_same_run, at_iteration

RARELY = ["train.save_every=1000"]


def stopped(trainer: Trainer, error: type[SparseSegError] = TrainingError) -> str:
    with pytest.raises(error) as caught:
        trainer.run()
    message = str(caught.value)
    assert "\n" not in message
    return message


FULL = OSError(errno.ENOSPC, "No space left on device", "log.jsonl")
MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
GPU = torch.AcceleratorError("CUDA error: an illegal instruction was encountered\nSearch for it")
NAN = float("nan")


def failing(part: str, name: str, error: Exception) -> Callable:
    return lambda trainer, patch: patch.setattr(getattr(trainer, part), name, Mock(side_effect=error))


def no_state(trainer: Trainer, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer_module, "save_state", Mock(side_effect=FULL))


def terminate(trainer: Trainer, patch: pytest.MonkeyPatch) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill_workers(trainer: Trainer, patch: pytest.MonkeyPatch) -> None:
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)


def hang_up(trainer: Trainer, patch: pytest.MonkeyPatch) -> None:
    """While it validates; a second signal, at the next image, would end it without saving."""
    load = trainer.validation.load

    def heard(index: int) -> object:
        os.kill(os.getpid(), signal.SIGHUP)
        return load(index)

    patch.setattr(trainer.validation, "load", heard)


def blank(trainer: Trainer, patch: pytest.MonkeyPatch) -> None:
    image, label = trainer.validation.load(0)
    patch.setattr(trainer.validation, "load", lambda index: (image, np.full_like(label, 255)))


def poison(trainer: Trainer, patch: pytest.MonkeyPatch) -> None:
    """The next step, and with it the statistics that it leaves."""
    forward = trainer.objective.forward
    patch.setattr(
        trainer.objective, "forward", lambda model, *batch: forward(model, NAN * batch[0], batch[1])
    )


def spoil(trainer: Trainer, patch: pytest.MonkeyPatch) -> None:
    trainer.model.module.backbone.conv1.weight.register_hook(lambda gradient: NAN * gradient)


LAST = r"the last good checkpoint is \S+last.pt, of iteration"
RESUME = r"resume with --work-dir \S+run --resume"
LOWER = "lower train.lr or set train.clip_grad_norm, then"
MADE = "log.jsonl: No space left on device; make room on the disk"
# settings, after which step what happens, and what is said
ENDINGS: dict[str, tuple[list[str], int, Callable, str]] = {
    "SIGTERM": ([], 3, terminate, f"stopped at iteration 3; {RESUME}"),
    "SIGHUP": ([], 1, hang_up, f"stopped at iteration 3; {RESUME}"),
    "worker": (
        ["data.workers=2"],
        1,
        kill_workers,
        rf"a data worker was .* data.workers; {LAST} \d; {RESUME}",
    ),
    "image": ([], 3, failing("dataset", "load", DataError("a.png: cut")), f"a.png: cut; {LAST} 3; {RESUME}"),
    "label": ([], 1, blank, f"validation at iteration 3 found no .*train.eval_images; {LAST} 3; {RESUME}"),
    "log": ([], 3, failing("report", "write", FULL), f"{MADE}; {LAST} 4; {RESUME}"),
    "state": (["train.save_every=3"], 3, no_state, f"{MADE}; {LAST} 3; {RESUME}"),
    "loss": ([], 3, poison, f"loss is nan at iteration 3; {LAST} 3; {LOWER} {RESUME}"),
    "gradient": ([], 3, spoil, f"gradient is nan at iteration 3; {LAST} 3; {LOWER} {RESUME}"),
    "memory": (
        [],
        3,
        failing("objective", "forward", MEMORY),
        f"no memory for a step; lower train.batch_size or data.crop; {LAST} 3; {RESUME}",
    ),
    "GPU": (  # what it held is lost: nothing is saved from there
        ["train.save_every=2"],
        3,
        failing("objective", "forward", GPU),
        f"the GPU failed: CUDA error: an illegal instruction was encountered; {LAST} 2; {RESUME}",
    ),
}


@pytest.mark.parametrize("ending", one_fast(*ENDINGS))
def test_what_ends_a_training_costs_no_step(tiny, trained, tmp_path, monkeypatch, ending):
    """It goes on as the unbroken run that all tests share."""
    settings, step, act, message = ENDINGS[ending]
    config, number = load_config(tiny, [*RARELY, *settings]), signal.SIGTERM
    trainer, before = Trainer(config, tmp_path / "run"), signal.getsignal(number)
    at_iteration(trainer, step, lambda: act(trainer, monkeypatch))
    assert re.fullmatch(
        message, stopped(trainer, DataError if ending in ("worker", "image") else TrainingError)
    )
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    Trainer(config, tmp_path / "run", resume=True).run()
    assert_same_run(tmp_path / "run", trained)


def test_a_full_disk_before_the_first_save_says_to_start_again(tiny, tmp_path, monkeypatch):
    trainer = Trainer(load_config(tiny, ["train.save_every=1"]), tmp_path / "run")
    no_state(trainer, monkeypatch)
    message = stopped(trainer)
    assert message.endswith("make room on the disk; no checkpoint was written yet; start again")
    monkeypatch.undo()
    Trainer(load_config(tiny, ["train.iterations=1"]), tmp_path / "run").run()  # as it says


@pytest.mark.parametrize(
    ("text", "is_the_gpus"),
    [
        ("merge_sort: failed to synchronize: cudaErrorIllegalInstruction: an illegal", True),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED after an illegal instruction", True),
        ("a fault of ours", False),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_errors_that_are_not_the_gpus_keep_their_traceback(text, is_the_gpus, tiny, tmp_path, monkeypatch):
    trainer = Trainer(load_config(tiny), tmp_path / "run")
    failing("objective", "forward", RuntimeError(text))(trainer, monkeypatch)
    with pytest.raises(TrainingError if is_the_gpus else RuntimeError, match=text):
        trainer.run()


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
