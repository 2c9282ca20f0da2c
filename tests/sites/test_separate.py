"""Exchange `separate`: no level reads the other, so P2 holds and P1 and P4 do not; who needs those says so.

Values and gradients of random networks, against a slow reference: `tests/graph/test_random_networks.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_seg import build_model, selective
from sparse_seg.checkpoint import load_model, save_model
from sparse_seg.config import load_config
from sparse_seg.config.rules import check_training
from sparse_seg.errors import ConfigError, SparseSegError
from sparse_seg.evaluation.cost import count_macs
from sparse_seg.export import ExportOptions
from sparse_seg.export.static import StaticNetwork
from sparse_seg.lab.compare.run import comparison_ways
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from tests.captured import NAME, trained
from tests.reference import relative_error

SIZE = (75, 101)
STRIDES = ((8, 16), (8, 16, 32))


def network(
    strides: tuple[int, ...] = (8, 16), exchange: str = "separate", policy: str = "edge"
) -> SelectiveNetwork:
    model = selective(trained().double(), strides, policy, 0.3, size=(64, 128))
    model.settings = dataclasses.replace(model.settings, exchange=exchange)
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def levels(model: SelectiveNetwork, level: int | None = None) -> Tensor:
    """Of the blocks of `images()`, random ones by default."""
    shape = (2, *(-(-length // model.strides[-1]) for length in SIZE))
    random = torch.randint(0, len(model.strides), shape, generator=torch.Generator().manual_seed(2))
    return random if level is None else torch.full_like(random, level)


@pytest.mark.parametrize("strides", STRIDES, ids=str)
@torch.no_grad()
def test_all_at_one_stride_is_the_dense_network(strides: tuple[int, ...]) -> None:
    """P2: nothing to keep apart."""
    model = network(strides)
    for level, step in ((0, strides[-1] // 8), (len(strides) - 1, 1)):
        found = model.start(images()).take(levels(model, level)).grid_logits()[:, :, ::step, ::step]
        dense = model.start(images()).follow(Way.dense(8 * step)).grid_logits()
        assert relative_error(found, dense) < 1e-12, step
    fine = model(images(), levels(model, len(strides) - 1))
    assert relative_error(fine, model.dense(images(), strides[0])) < 1e-12


@torch.no_grad()
def test_the_lattice_depends_on_the_mask() -> None:
    """P1 does not hold, and a run under another rule does not change the network."""
    model = network()
    coarse = model.start(images()).follow(Way.dense(16)).grid_logits()
    mixed = model.start(images()).take(levels(model)).grid_logits()[:, :, ::2, ::2]
    assert relative_error(mixed, coarse) > 0.05
    other = model.start(images()).take(levels(model), Way(exchange="none")).grid_logits()[:, :, ::2, ::2]
    assert relative_error(other, coarse) < 1e-12


@pytest.mark.parametrize("strides", STRIDES, ids=str)
@torch.no_grad()
def test_fast_networks_are_equal(strides: tuple[int, ...]) -> None:
    model = network(strides)
    expected, found = (one(images(), levels(model)) for one in (model, model.for_inference()))
    assert relative_error(found, expected) < 1e-11


@pytest.mark.parametrize(("policy", "train"), [("confidence", False), ("confidence", True), ("gain", False)])
@torch.no_grad()
def test_policies_that_read_a_coarse_pass_run_two(policy: str, train: bool) -> None:
    """The mask is the one that the dense coarse network asks for, and both passes count."""
    torch.manual_seed(0)  # of gain's own net
    model, given = network(policy=policy), images()
    model.double()
    expected = model.start(given).follow(Way(exchange="linear")).levels
    run = model.train(train).start(given).follow()
    assert torch.equal(run.levels, expected)
    if train:
        return
    again = model.start(given).take(expected)
    assert relative_error(run.logits(), again.logits()) < 1e-12
    coarse, macs = count_macs(model, given, Way.dense(16)), again.macs()
    both = sum(run.macs().values()) - run.macs()["mask"]
    assert both == sum(coarse.values()) - coarse["early"] + sum(macs.values())


@torch.no_grad()
def test_a_rule_given_by_the_way() -> None:
    """A network of another rule, too, runs confidence in two passes under this one."""
    model = network(exchange="linear", policy="confidence")
    run = model.start(images()).follow(Way(exchange="separate"))
    assert run.memory is None
    assert run.mask is not None
    expected = model.start(images()).take(run.mask, Way(exchange="separate")).logits()
    assert relative_error(run.logits(), expected) < 1e-12
    refined = model.start(images()).start_coarse()
    with pytest.raises(ValueError, match="exchange separate makes all sites depend on the mask"):
        refined.take(run.mask, Way(exchange="separate"))


def test_what_needs_p1_or_p4_refuses() -> None:
    model = network()
    with pytest.raises(ValueError, match="exchange separate makes coarse sites depend on the mask"):
        next(model.refine(images(), fractions=[0, 0.5]))
    with pytest.raises(SparseSegError, match="exchange separate makes coarse sites depend on the mask"):
        model.start(images()).take(levels(model), Way(merge="patch"))
    with pytest.raises(SparseSegError, match=r"exchange separate makes the coarse lattice .*--dense only"):
        StaticNetwork(model, ExportOptions((64, 96)))
    StaticNetwork(model, ExportOptions((64, 96), dense=8))
    with pytest.raises(ConfigError, match="separate, patch: merge patch needs a coarse pass"):
        comparison_ways(model, ["edge"], [0.2], ["linear", "separate"], ["whole", "patch"])
    with pytest.raises(ConfigError, match=r"merge=patch .* model.exchange=separate"):
        build_model({"module": NAME, "exchange": "separate", "merge": "patch"})


def test_training_that_needs_the_lattice_refuses(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {exchange: separate}\ntrain: {network: selective, loss: {coarse_weight: 0.4}}\n")
    with pytest.raises(ConfigError, match=r"coarse_weight needs .* not with train.network=selective"):
        check_training(load_config(path))
    check_training(load_config(path, ["train.network=dense"]))


def test_which_ways_refine() -> None:
    model = network(exchange="linear")
    assert model.refines(Way())
    assert model.refines(Way(exchange="none"))
    assert not model.refines(Way(exchange="separate"))
    assert not network().refines(Way())
    assert network().refines(Way(exchange="linear"))


def test_a_config_and_a_file_say_rule_and_engine(tmp_path: Path) -> None:
    settings = {"module": NAME, "num_classes": 3, "exchange": "separate", "engine": "gather"}
    model = build_model(settings).eval()
    save_model(model, tmp_path / "net.safetensors")
    for one in (model, model.for_inference(), load_model(tmp_path / "net.safetensors")):
        assert (one.exchange, one.engine) == ("separate", "gather")
        assert (one.settings.exchange, one.settings.engine) == ("separate", "gather")
