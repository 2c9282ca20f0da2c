"""Going on from what another training left: whole states, or one line that says why not."""

import copy

import pytest
import torch

from sparse_seg.checkpoint import digest_of
from sparse_seg.config import load_config
from sparse_seg.errors import CheckpointError
from sparse_seg.training.checkpoint import LAST, load_state
from sparse_seg.training.trainer import Trainer


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """A config and the folder of its run of two iterations."""
    folder = tmp_path_factory.mktemp("state")
    (folder / "tiny.yaml").write_text(
        f"""
model: {{width: 0.0625, depths: [1, 1, 1, 1], head_channels: 4}}
data: {{dataset: scenes, root: {scenes}, crop: [64, 64]}}
train: {{iterations: 2, batch_size: 2, optimizer: adamw, ema_decay: 0.9, eval_images: 1, threads: 1}}
"""
    )
    Trainer(load_config(folder / "tiny.yaml"), folder / "run").run()
    return folder


def resume(finished, tmp_path, content=None):
    config = load_config(finished / "tiny.yaml", ["train.iterations=3"])
    path = finished / "run" / LAST
    if content is not None:
        path = tmp_path / LAST
        torch.save(content, path)
    return Trainer(config, tmp_path / f"from {path.parent.name}", resume=path)


@pytest.fixture(scope="module")
def whole(finished):
    """The content of its state, without a digest."""
    content = torch.load(finished / "run" / LAST, weights_only=True)
    digest = content.pop("digest")
    assert digest == digest_of(content)
    return content


def test_a_state_carries_a_digest_and_goes_on(finished, whole, tmp_path):
    assert resume(finished, tmp_path).iteration == 2
    assert resume(finished, tmp_path, whole).iteration == 2  # as version 0.1 wrote it
    changed = torch.load(finished / "run" / LAST, weights_only=True)
    changed["progress"]["best"] += 0.01
    with pytest.raises(CheckpointError, match="is damaged: its digest is wrong"):
        resume(finished, tmp_path, changed)


def momenta(content):
    return next(iter(content["optimizer"]["state"].values()))


CHANGES = {
    "no progress": lambda c: c.pop("progress"),
    "progress of nothing": lambda c: c.update(progress={}),
    "iteration as text": lambda c: c["progress"].update(iteration="2"),
    "negative iteration": lambda c: c["progress"].update(iteration=-1),
    "best is nan": lambda c: c["progress"].update(best=float("nan")),
    "another attribute": lambda c: c["progress"].update(run=1),
    "no random": lambda c: c.update(random=None),
    "short random": lambda c: c.update(random=c["random"][:-1]),
    "zeros for random": lambda c: c.update(random=torch.zeros_like(c["random"])),
    "no optimizer": lambda c: c.pop("optimizer"),
    "optimizer of nothing": lambda c: c.update(optimizer={}),
    "momentum of another shape": lambda c: momenta(c).update(exp_avg=torch.zeros(1)),
    "momentum is complex": lambda c: momenta(c).update(exp_avg=momenta(c)["exp_avg"].to(torch.complex64)),
    "momentum is nan": lambda c: momenta(c).update(exp_avg=momenta(c)["exp_avg"] * float("nan")),
    "negative square": lambda c: momenta(c).update(exp_avg_sq=momenta(c)["exp_avg_sq"] - 1),
    "momentum missing": lambda c: momenta(c).pop("exp_avg"),
    "a group missing": lambda c: c["optimizer"]["param_groups"].pop(),
    "unknown parameter": lambda c: c["optimizer"]["state"].update({10**6: momenta(c)}),
    "scaler as text": lambda c: c.update(scaler="x"),
    "no config": lambda c: c.pop("config"),
    "config of another version": lambda c: c["config"]["model"].update(depth=3),
    "no ema": lambda c: c.pop("ema"),
    "ema as list": lambda c: c.update(ema=[1]),
    "a weight as number": lambda c: c["model"].update({"module.backbone.conv1.weight": 1.0}),
    "a weight of another kind": lambda c: c["model"].update(
        {"module.backbone.conv1.weight": c["model"]["module.backbone.conv1.weight"].to(torch.complex64)}
    ),
}


@pytest.fixture(scope="module")
def trainer(finished, tmp_path_factory):
    """What all damaged states are restored into."""
    return Trainer(
        load_config(finished / "tiny.yaml", ["train.iterations=3"]), tmp_path_factory.mktemp("own")
    )


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_damaged_states_are_refused_in_one_line(change, whole, trainer, tmp_path):
    content, path = copy.deepcopy(whole), tmp_path / LAST
    change(content)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"last\.pt") as caught:
        trainer._restore(load_state(path), path)
    assert "\n" not in str(caught.value)
    assert trainer.iteration == 0


def test_a_state_of_an_earlier_version_says_how_to_go_on(finished, whole, tmp_path):
    content = dict(whole)
    content["model"] = {name.removeprefix("module."): one for name, one in content["model"].items()}
    with pytest.raises(
        CheckpointError, match=r"by an earlier version.*train\.init=.*best\.safetensors"
    ) as caught:
        resume(finished, tmp_path, content)
    assert "\n" not in str(caught.value)


def test_weights_alone_cannot_be_gone_on_from(finished):
    for name in ("best.safetensors", "best.pt"):
        with pytest.raises(CheckpointError, match=r"holds weights only; resume from last\.pt"):
            load_state(finished / "run" / name)
