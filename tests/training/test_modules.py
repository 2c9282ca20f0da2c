"""Train any network that can be imported, from a config to a file that loads without its code."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_seg import build_model, load_model, save_model, selective
from sparse_seg.config import Config, config_from_dict
from sparse_seg.data import open_split
from sparse_seg.data.batches import training_batches
from sparse_seg.errors import CheckpointError, ConfigError, TrainingError
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.training.statistics import recalibrate_batch_norm
from sparse_seg.training.trainer import Trainer
from tests import captured
from tests.training.test_trainer import assert_same_run, at_iteration

Configured = Callable[..., Config]


@pytest.fixture
def configured(scenes: Path) -> Configured:
    """The config of a tiny run, with `model`, `train` and `data` keys over it."""

    def make(model: Any = None, train: Any = None, data: Any = None) -> Config:
        tree = {
            "model": {
                "module": captured.NAME,
                "module_args": {"classes": 19},
                "mask": {"policy": "confidence"},
                **(model or {}),
            },
            "data": {"root": str(scenes), "crop": [64, 64], **(data or {})},
            "train": {
                **{"iterations": 2, "batch_size": 2, "lr": 0.01, "log_every": 1, "eval_every": 2},
                **{"save_every": 1, "ema_decay": 0.9, "eval_images": 1, **(train or {})},
            },
        }
        return config_from_dict(tree, "test")

    return make


def trained_at(config: Config, folder: Path) -> Trainer:
    trainer = Trainer(config, folder)
    trainer.run()
    return trainer


@pytest.mark.parametrize(("network", "merge"), [("dense", "whole"), ("selective", "patch")])
def test_training_writes_a_file_that_needs_no_code(
    configured: Configured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, merge: str
) -> None:
    """And resumes bit for bit."""
    trainer = trained_at(configured(model={"merge": merge}, train={"network": network}), tmp_path / "whole")
    first = Trainer(trainer.config, tmp_path / "parts")
    at_iteration(first, 1, lambda: first.stop.request(signal.SIGINT, None))
    with pytest.raises(TrainingError, match="stopped at iteration 1"):
        first.run()
    Trainer(trainer.config, tmp_path / "parts", resume=True).run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    after = trainer.model
    torch.manual_seed(trainer.config.train.seed)
    changed = [
        name
        for name, tensor in build_model(trainer.config).module.named_parameters()
        if not torch.equal(tensor, after.module.get_parameter(name))
    ]
    assert "early.0.0.weight" in changed
    assert "head.weight" in changed
    monkeypatch.setattr("sparse_seg.run.build._imported", lambda name: pytest.fail(f"imports {name}"))
    found, images = load_model(tmp_path / "whole/best.safetensors"), torch.randn(1, 3, 64, 96)
    assert isinstance(found, SelectiveNetwork)
    assert found.card is not None
    assert found.card.names[0] == "road"
    again = load_model(tmp_path / "whole/best.safetensors", trainer.config)
    assert torch.equal(found(images), again(images))
    assert (found.settings.module, found.settings.module_args) == (captured.NAME, {"classes": 19})


def test_starts_from_a_file_with_a_graph(configured: Configured, tmp_path: Path) -> None:
    source = captured.trained(19)
    save_model(selective(source, size=(64, 64)), tmp_path / "net.safetensors")
    config = configured(train={"init": str(tmp_path / "net.safetensors")})
    found = Trainer(config, tmp_path / "run").model.module.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in source.state_dict().items())
    other = configured(model={"module_args": {"classes": 19, "mixing": True}, "mask": {"policy": "edge"}})
    other.train.init = config.train.init
    with pytest.raises(CheckpointError, match=r"another network than model\.module makes.* first in"):
        Trainer(other, tmp_path / "other")


def test_starts_from_a_plain_state_dict(
    configured: Configured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    source = captured.build(5)
    wrapped = {"state_dict": {f"module.{name}": one for name, one in source.state_dict().items()}}
    torch.save(wrapped, tmp_path / "five.pth")
    config = configured(model={"pretrained": str(tmp_path / "five.pth")})
    found = Trainer(config, tmp_path / "run").model.module
    assert torch.equal(found.get_parameter("late.1.0.weight"), source.get_parameter("late.1.0.weight"))
    count = len(source.state_dict())
    said = capsys.readouterr().out
    assert f"pretrained: {count - 4} of {count} tensors" in said
    assert "fresh: head.weight (and 3 more)" in said
    torch.save({"other.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="holds no tensor with name and shape"):
        Trainer(configured(model={"pretrained": str(tmp_path / "other.pth")}), tmp_path / "none")


@pytest.mark.parametrize("mode", ["supervised", "straight_through"])
def test_a_learned_mask_is_trained(configured: Configured, tmp_path: Path, mode: str) -> None:
    """Supervised on a network that is frozen; straight through together with the network."""
    trained_at(configured(train={"iterations": 1}), tmp_path / "network")
    init, frozen = str(tmp_path / "network/best.safetensors"), mode == "supervised"
    settings = {"init": init, "freeze": frozen, "mask_loss": mode, "ema_decay": None, "network": "selective"}
    trainer = Trainer(configured({"mask": {"policy": "learned"}}, settings), tmp_path / "mask")
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.run()
    after = trainer.model.state_dict()
    changed = {name.partition(".")[0] for name, one in before.items() if not torch.equal(one, after[name])}
    assert changed == ({"policy"} if frozen else {"policy", "module"})
    found = load_model(tmp_path / "mask/best.safetensors").state_dict()
    assert all(torch.equal(one, found[name]) for name, one in after.items() if name in found)
    assert any(name.startswith("policy.net.") for name in found)
    model = load_model(tmp_path / "mask/best.safetensors")
    policy = model.policy_for(Way.policy("learned", 0.5))
    assert (policy.net is model.policy.net, policy.fine_fraction) == (True, 0.5), "it serves other cuts"
    edge = load_model(tmp_path / "mask/best.safetensors", configured({"mask": {"policy": "edge"}}))
    assert edge.policy.name == "edge"
    with pytest.raises(ConfigError, match="this network has no learned mask: set model"):
        load_model(init).policy_for(Way.policy("learned"))


def test_losses_on_detail_and_distillation_work_together(configured: Configured, tmp_path: Path) -> None:
    save_model(selective(captured.trained(19), size=(64, 64)), tmp_path / "teacher.safetensors")
    distill = {"teacher": str(tmp_path / "teacher.safetensors"), "features_weight": 1.0}
    for network in ("dense", "selective"):
        loss = {"coarse_weight": 0.5, "fine_weight": 1.0, "boundary_weight": 1.0}
        settings = {"network": network, "distill": distill, "loss": loss, "iterations": 1}
        trained_at(configured(train=settings), tmp_path / network)


def test_a_network_that_no_file_holds_does_not_begin_to_train(configured: Configured, tmp_path: Path) -> None:
    config = configured({"module": "tests.graph.test_own_code:Attending"})
    with pytest.raises(CheckpointError, match=r"^attention runs by its own code"):
        Trainer(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def not_a_module() -> int:
    return 1


def fails() -> nn.Module:
    raise RuntimeError("no such weights\nsecond line")


MODULES = {
    "no callable": ("tests.captured", r"must be PACKAGE:CALLABLE, as my_package\.nets:build"),
    "no package": ("tests.capturd:build", r"tests\.capturd cannot be imported"),
    "a misspelt one": ("tests.captured:biuld", r"tests\.captured has no biuld; did you mean 'build'"),
    "no module": (f"{__name__}:not_a_module", r"gives a int, not an nn\.Module"),
    "an error": (f"{__name__}:fails", r"cannot be made with \{\}: RuntimeError: no such weights$"),
    "other classes": ("tests.captured:build", r"gives 3 classes, but 19 are asked for"),
}


@pytest.mark.parametrize("what", MODULES)
def test_a_module_that_cannot_be_made_is_one_line(what: str) -> None:
    name, message = MODULES[what]
    with pytest.raises(ConfigError, match=message):
        build_model({"module": name, "num_classes": 19})


def test_strides_are_the_modules_own_or_chosen(configured: Configured) -> None:
    assert build_model(configured()).strides == (8, 16)
    assert build_model(configured(model={"strides": [16, 32]})).strides == (16, 32)
    assert build_model(configured(model={"strides": [4, 8, 16]})).strides == (4, 8, 16)
    with pytest.raises(ConfigError, match=r"a network of ours has one of \[8, 16\]"):
        build_model({"strides": [32, 64]})


def test_batch_norms_are_recalibrated_as_pytorch_has_them(configured: Configured) -> None:
    """Dense, the running statistics are those of the module itself without a momentum."""
    config = configured()
    model = build_model(config)
    module = copy.deepcopy(model.module).eval()
    recalibrate_batch_norm(model, config, "dense", 3)
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    data = config.data
    dataset = open_split(data, "train")
    for images, _ in training_batches(dataset, config, 0, 3):
        module(images)
    found = model.module.state_dict()
    for name, expected in module.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
