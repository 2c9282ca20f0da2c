"""The training loop: resume bit for bit, stop safely, refuse what cannot work."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.context import ForkProcess
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sparse_seg import load_model
from sparse_seg.checkpoint import load
from sparse_seg.checkpoint.captured import content_of
from sparse_seg.cli import main
from sparse_seg.config import load_config
from sparse_seg.errors import CheckpointError, DataError, SparseSegError, TrainingError
from sparse_seg.run.build import build_model
from sparse_seg.training.checkpoint import best_of, load_state, save_checkpoint
from sparse_seg.training.finish import finish_training
from sparse_seg.training.objective import Objective
from sparse_seg.training.stopping import AlreadyTrained
from sparse_seg.training.trainer import Trainer


def log_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def run(config, folder, **options):
    trainer = Trainer(config, folder, **options)
    trainer.run()
    return trainer


def at_iteration(trainer: Trainer, iteration: int, act) -> None:
    """Act once the step is done, logged, validated and saved."""
    after_step = trainer._after_step

    def then_act() -> None:
        after_step()
        if trainer.iteration == iteration:
            act()

    trainer._after_step = then_act  # type: ignore[method-assign]


def assert_same_run(folder: Path, other: Path) -> None:
    """Two runs came to the same log and, bit for bit, the same state."""
    assert log_of(folder) == log_of(other)
    own, expected = load_state(folder / "last.pt"), load_state(other / "last.pt")
    for kind in ("model", "ema"):
        for name, tensor in own[kind].items():
            assert torch.equal(tensor, expected[kind][name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["train.optimizer=adamw", "train.network=selective", "model.mask.policy=random", "data.workers=2"],
        ["train.amp=true", "train.amp_dtype=float16", "model.head=deeplabv3"],
        ["train.network=selective", "model.mask.policy=learned"],
        ["train.distill.teacher={}/best.safetensors", "train.distill.cache=cache", "data.on_device=true"],
    ],
    ids=["selective", "float16", "learned mask", "distilled, frames on the device"],
)
def test_resumed_run_equals_unbroken_run_bit_for_bit(tiny, trained, tmp_path, monkeypatch, overrides):
    """Stopped one past the last save: the resumed run repeats it. The plain case is in test_stopping.py."""
    monkeypatch.chdir(tmp_path)
    overrides = ["train.iterations=4", "train.eval_every=2", "train.eval_images=1", *overrides]
    config = load_config(tiny, [override.format(trained) for override in overrides])
    run(config, tmp_path / "whole")
    broken = Trainer(config, tmp_path / "broken")

    def stop() -> None:
        raise KeyboardInterrupt

    at_iteration(broken, 3, stop)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert load_state(tmp_path / "broken/last.pt")["progress"]["iteration"] == 2
    run(config, tmp_path / "broken", resume=True)
    assert_same_run(tmp_path / "broken", tmp_path / "whole")


def start(tiny, folder, *settings) -> ForkProcess:
    """`sparse-seg train` in a process group of its own, which says what it says in `FOLDER.txt`."""

    def train() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with folder.with_suffix(".txt").open("w") as said, redirect_stdout(said), redirect_stderr(said):
            code = main(["train", str(tiny), "--work-dir", str(folder), "--set", *settings])
        sys.exit(code)

    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    return process


def wait_for_iteration(folder: Path, iteration: int, process: ForkProcess) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        path = folder / "log.jsonl"
        if path.exists() and f'"iteration": {iteration},' in path.read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"the run never reached iteration {iteration}: {folder.with_suffix('.txt').read_text()}")


@pytest.mark.slow
def test_killed_run_goes_on_with_the_same_losses(tiny, trained, tmp_path):
    process = start(tiny, tmp_path / "run", "train.save_every=1")
    wait_for_iteration(tmp_path / "run", 2, process)
    process.kill()
    process.join()
    assert 1 <= load_state(tmp_path / "run/last.pt")["progress"]["iteration"] < 6
    run(load_config(tiny, ["train.save_every=1"]), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", trained)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_resume(tiny, tmp_path):
    settings = ["train.iterations=10000", "train.eval_every=10000", "train.save_every=10000"]
    process = start(tiny, tmp_path / "run", *settings, "data.workers=2")
    wait_for_iteration(tmp_path / "run", 2, process)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    process.join(120)
    assert process.exitcode == 1
    said = (tmp_path / "run.txt").read_text()
    assert said.count("stopping after this step") == 1
    assert re.search(
        rf"^error: stopped at iteration \d+; .*--work-dir {tmp_path / 'run'} --resume$", said, re.M
    )
    state = load_state(tmp_path / "run/last.pt")
    assert state["progress"]["iteration"] == log_of(tmp_path / "run")[-1]["iteration"]


def test_a_finished_run_is_not_trained_again(tiny, trained, tmp_path, capsys):
    """Resumed it is a success; another training in its folder is refused; and nothing is touched."""
    config, before = load_config(tiny), {path: path.read_bytes() for path in trained.iterdir()}
    arguments = ["train", str(tiny), "--work-dir", str(trained), "--set", "data.root=not_needed", "--resume"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "run is already trained to iteration 6; raise train.iterations to continue" in said
    last = shutil.copy(trained / "last.pt", tmp_path)
    for resume in (False, last):
        with pytest.raises(TrainingError, match="already holds a run; add --resume alone"):
            Trainer(config, trained, resume)
    with pytest.raises(TrainingError, match="already trained to iteration 6") as caught:
        Trainer(config, tmp_path / "new", last)
    assert not isinstance(caught.value, AlreadyTrained), "the new folder holds no trained network"
    assert {path: path.read_bytes() for path in trained.iterdir()} == before


@pytest.mark.slow
def test_best_of_another_folder_is_not_claimed(tiny, trained, tmp_path):
    last = shutil.copytree(trained, tmp_path / "first") / "last.pt"
    state = torch.load(last, weights_only=True)
    del state["digest"]
    state["progress"]["best"] = 0.99
    torch.save(state, last)
    config = load_config(tiny, ["train.iterations=7"])
    assert run(config, tmp_path / "second", resume=last).best < 0.99
    assert best_of(tmp_path / "second").exists()
    assert run(config, tmp_path / "first", resume=True).best == 0.99
    best_of(tmp_path / "first").unlink()
    assert run(config, tmp_path / "first", resume=True).best == log_of(tmp_path / "first")[-1]["miou"] < 0.99
    assert best_of(tmp_path / "first").exists(), "a finished run makes up for it"


def test_settings_changed_on_resume_take_effect(tiny, trained, tmp_path):
    changed = load_config(tiny, ["train.iterations=7", "train.weight_decay=0.5", "train.momentum=0.2"])
    resumed = Trainer(changed, shutil.copytree(trained, tmp_path / "run"), resume=True)
    settings = [(group["weight_decay"], group["momentum"]) for group in resumed.optimizer.param_groups]
    assert settings == [(0.5, 0.2), (0.0, 0.2)]
    assert all("momentum_buffer" in state for state in resumed.optimizer.state.values())


@pytest.mark.slow
def test_float16_may_be_switched_on_resume(tiny, tmp_path):
    settings = ["train.amp_dtype=float16", "train.eval_every=1000", "train.eval_images=1"]
    for iterations, amp in enumerate(("true", "false", "true"), start=1):
        config = load_config(tiny, [*settings, f"train.amp={amp}", f"train.iterations={iterations}"])
        run(config, tmp_path / "run", resume=iterations > 1)


@pytest.mark.slow
def test_finish_training_starts_goes_on_and_leaves_alone(tiny, trained, tmp_path, monkeypatch):
    """Whatever ends it, its advice can be followed."""
    config, written = load_config(tiny), (trained / "best.safetensors").stat().st_mtime_ns
    assert finish_training(config, trained).stat().st_mtime_ns == written
    with pytest.raises(TrainingError, match="holds a run of another config"):
        finish_training(load_config(tiny, ["train.lr=0.02"]), trained)
    monkeypatch.setattr(Trainer, "_after_step", lambda trainer: trainer.stop.request(signal.SIGINT, None))
    with pytest.raises(TrainingError, match="stopped at iteration 1; run it again to resume"):
        finish_training(config, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(Objective, "forward", lambda *_: torch.tensor(float("nan")))
    advice = f"then run it again to resume, with another config after removing {tmp_path / 'run'}$"
    with pytest.raises(TrainingError, match=f"loss is nan at iteration 1; .*{advice}"):
        finish_training(config, tmp_path / "run")
    monkeypatch.undo()
    assert finish_training(config, tmp_path / "run").exists()
    assert log_of(tmp_path / "run")[-1] == log_of(trained)[-1]


@pytest.mark.slow
def test_best_checkpoint_predicts_as_the_averaged_model(tiny, trained):
    best, state = load(trained / "best.pt"), load_state(trained / "last.pt")
    assert best.config.width == 0.125
    assert best.version
    logged = max(line["miou"] for line in log_of(trained) if "miou" in line)
    assert best.training["miou"] == logged == state["progress"]["best"]
    averaged, images = build_model(load_config(tiny)), torch.randn(1, 3, 64, 96)
    averaged.load_state_dict(state["ema"])
    torch.testing.assert_close(load_model(trained / "last.pt")(images), averaged.eval()(images))
    wider = load_config(tiny, ["model.head_channels=32"])
    with pytest.raises(CheckpointError, match=r"reduce\.0\.weight is \[16, 64, 1, 1\], the model's is \[32"):
        load_model(trained / "last.pt", wider)


def test_a_config_says_how_a_network_runs_and_not_another_function(tiny, tmp_path):
    own, path = load_config(tiny), tmp_path / "a.pt"
    save_checkpoint(path, own, *content_of(build_model(own)))
    free = ["model.mask.policy=random", "model.engine=gather", "model.exchange=none"]
    assert load_model(path, load_config(tiny, free)).exchange == "none"
    for override, found in (
        ("model.backbone=resnet34", "use --set model.backbone=resnet18"),
        ("model.width=0.25", "use --set model.width=0.125"),
        ("model.trained_stride=16", "use --set model.trained_stride=8"),
        ("data.std=[1, 1, 1]", "use --set data.std=[0.229,0.224,0.225]"),
        ("data.dataset=camvid", "has 19 classes, but 11 are asked for"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(found)):
            load_model(path, load_config(tiny, [override]))


def test_a_pickle_that_wants_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": "sparse_seg.checkpoint", "model": Attack()}, tmp_path / "attack.pt")
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "attack.pt")
    assert not (tmp_path / "ran").exists()


TRAINS = [0.0] * 16 + [1.0, 0.0, 0.0]  # the weights of classes, of which no scene has that one
NO_WEIGHT = r"class_weights are all below .* nothing would be learned"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.root=nowhere"], "no synthetic scenes there; make them with"),
        (["model.num_classes=5"], r"model\.num_classes is 5 but scenes has 19 classes"),
        *(([f"train.loss.class_weights={one}"], NO_WEIGHT) for one in (TRAINS, [0.0] * 19, [1e-300] * 19)),
    ],
)
def test_what_cannot_train_is_refused_before_the_first_step(tiny, tmp_path, settings, message):
    with pytest.raises(SparseSegError, match=message):
        Trainer(load_config(tiny, settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(CheckpointError, match="does not exist"):
        Trainer(load_config(tiny), tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_train_labels_without_a_class_are_refused_before_training(tiny, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "scenes")
    for label in tmp_path.glob("scenes/gtFine/train/*/*_labelIds.png"):
        assert cv2.imwrite(str(label), np.zeros((64, 96), np.uint8))
    with pytest.raises(
        DataError, match="no pixel of 8 labels belongs to a class: their values are 0, all ig"
    ):
        Trainer(load_config(tiny, [f"data.root={tmp_path / 'scenes'}"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
