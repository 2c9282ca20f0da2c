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

import numpy as np
import pytest
import torch

from sparse_seg import load_model
from sparse_seg.checkpoint import load
from sparse_seg.checkpoint.captured import content_of
from sparse_seg.cli import main
from sparse_seg.config import load_config
from sparse_seg.errors import CheckpointError, ConfigError, DataError, TrainingError
from sparse_seg.run.build import build_model
from sparse_seg.training.checkpoint import best_of, load_state, save_checkpoint
from sparse_seg.training.finish import finish_training
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
def test_killed_run_goes_on_with_the_same_losses(tiny, tmp_path):
    settings = ["train.iterations=12", "train.eval_every=12", "train.eval_images=1", "train.save_every=1"]
    process = start(tiny, tmp_path / "killed", *settings)
    wait_for_iteration(tmp_path / "killed", 4, process)
    process.kill()
    process.join()
    reached = load_state(tmp_path / "killed/last.pt")["progress"]["iteration"]
    assert 3 <= reached < 12
    config = load_config(tiny, settings)
    run(config, tmp_path / "killed", resume=True)
    run(config, tmp_path / "whole")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


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


def test_gradient_that_is_not_finite_stops_before_the_weights_change(tiny, tmp_path):
    trainer = Trainer(load_config(tiny), tmp_path / "run")
    weight = trainer.model.module.backbone.conv1.weight
    weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(
        TrainingError,
        match=r"gradient is (nan|inf) at iteration 0; no checkpoint was written yet; "
        r"lower train\.lr or set train\.clip_grad_norm, then start again$",
    ):
        trainer.run()
    assert weight.isfinite().all()


@pytest.mark.slow
def test_a_folder_with_a_run_is_refused_unless_resuming(tiny, trained, tmp_path):
    config, before = load_config(tiny), (trained / "last.pt").read_bytes()
    with pytest.raises(TrainingError, match="already holds a run; add --resume alone"):
        Trainer(config, trained)
    with pytest.raises(TrainingError, match=r"already trained to iteration 6; raise train\.iterations"):
        Trainer(config, trained, resume=True)
    shutil.copy(trained / "last.pt", tmp_path)
    with pytest.raises(TrainingError, match="already holds a run"):
        Trainer(config, trained, resume=tmp_path / "last.pt")
    assert (trained / "last.pt").read_bytes() == before


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


@pytest.mark.slow
def test_validation_without_a_label_is_named(tiny, tmp_path, monkeypatch):
    trainer = Trainer(load_config(tiny), tmp_path / "run")
    load = trainer.validation.load
    monkeypatch.setattr(trainer.validation, "load", lambda i: (load(i)[0], np.full_like(load(i)[1], 255)))
    with pytest.raises(TrainingError, match="validation at iteration 3 found no labelled pixel"):
        trainer.run()
    assert load_state(tmp_path / "run/last.pt")["progress"]["iteration"] == 3


def test_settings_changed_on_resume_take_effect(tiny, trained, tmp_path):
    changed = load_config(tiny, ["train.iterations=7", "train.weight_decay=0.5", "train.momentum=0.2"])
    resumed = Trainer(changed, shutil.copytree(trained, tmp_path / "run"), resume=True)
    settings = [(group["weight_decay"], group["momentum"]) for group in resumed.optimizer.param_groups]
    assert settings == [(0.5, 0.2), (0.0, 0.2)]
    assert all("momentum_buffer" in state for state in resumed.optimizer.state.values())


def test_float16_may_be_switched_on_resume(tiny, tmp_path):
    settings = ["train.amp_dtype=float16", "train.eval_every=1000", "train.eval_images=1"]
    for iterations, amp in enumerate(("true", "false", "true"), start=1):
        config = load_config(tiny, [*settings, f"train.amp={amp}", f"train.iterations={iterations}"])
        run(config, tmp_path / "run", resume=iterations > 1)


@pytest.mark.slow
def test_finish_training_starts_goes_on_and_leaves_alone(tiny, trained, tmp_path, monkeypatch):
    config, written = load_config(tiny), (trained / "best.safetensors").stat().st_mtime_ns
    assert finish_training(config, trained).stat().st_mtime_ns == written
    with pytest.raises(TrainingError, match="holds a run of another config"):
        finish_training(load_config(tiny, ["train.lr=0.02"]), trained)
    monkeypatch.setattr(Trainer, "_after_step", lambda trainer: trainer.stop.request(signal.SIGINT, None))
    with pytest.raises(TrainingError, match="stopped at iteration 1; run it again to resume"):
        finish_training(config, tmp_path / "run")
    monkeypatch.undo()
    assert finish_training(config, tmp_path / "run").exists()
    last = log_of(tmp_path / "run")[-1], log_of(trained)[-1]
    assert last[0] == last[1]


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


def test_checkpoints_that_do_not_fit_are_named(tiny, trained, tmp_path):
    wider = load_config(tiny, ["model.head_channels=32"])
    with pytest.raises(
        CheckpointError, match=r"head\.reduce\.0\.weight is \[16, 64, 1, 1\], the model's is \[32"
    ):
        load_model(trained / "last.pt", wider)
    with pytest.raises(CheckpointError, match="does not exist"):
        Trainer(wider, tmp_path / "empty", resume=True)
    assert not (tmp_path / "empty").exists()


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


def test_bad_data_is_found_before_the_first_step(tiny, tmp_path):
    with pytest.raises(DataError, match="no synthetic scenes there; make them with"):
        Trainer(load_config(tiny, [f"data.root={tmp_path / 'none'}"]), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model\.num_classes is 5 but scenes has 19 classes"):
        Trainer(load_config(tiny, ["model.num_classes=5"]), tmp_path / "run")
    with pytest.raises(ConfigError):
        load_config(tiny, ["data.dataset=nothing"])
    assert not (tmp_path / "run").exists()
