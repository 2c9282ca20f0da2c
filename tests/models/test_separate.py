"""Exchange `separate`: no level reads the other, so P2 holds and P1 and P4 do not; who needs those says so.

Values and gradients, against a slow reference: `tests/models/test_selective.py` and `tests/sparse`.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_seg import build_model
from sparse_seg.config import load_config
from sparse_seg.config.rules import check_training
from sparse_seg.errors import ConfigError, SparseSegError
from sparse_seg.evaluation.cost import count_macs
from sparse_seg.export import ExportOptions, StaticNetwork
from sparse_seg.lab.compare.run import comparison_ways
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from tests.reference import randomise, relative_error

SIZE = (75, 101)


def network(**settings: object) -> SelectiveNetwork:
    torch.manual_seed(0)
    small = {"width": 0.125, "num_classes": 5, "head_channels": 16, "exchange": "separate"}
    model = build_model(small | settings)
    randomise(model)
    return model.double().eval()


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def levels(model: SelectiveNetwork, level: int | None = None) -> Tensor:
    """Of the blocks of `images()`, random ones by default."""
    shape = (2, *(-(-length // model.strides[-1]) for length in SIZE))
    random = torch.randint(0, len(model.strides), shape, generator=torch.Generator().manual_seed(2))
    return random if level is None else torch.full_like(random, level)


@pytest.mark.parametrize("settings", [{}, {"shortcut": "avg_pool", "stem": "deep"}], ids=["plain", "pooled"])
@pytest.mark.parametrize("strides", [[8, 16], [8, 16, 32], [4, 8, 16]], ids=str)
@torch.no_grad()
def test_all_at_one_stride_is_the_dense_network(strides: list[int], settings: dict) -> None:
    """P2, of features: nothing to keep apart. The logits, too, at the fine end."""
    model = network(strides=strides, **settings)
    for level, stride in enumerate(reversed(strides)):
        if level in (0, len(strides) - 1):
            found = model.start(images()).take(levels(model, level)).stage_rows()[-1]
            dense = model.start(images()).follow(Way.dense(stride)).stage_rows()[-1]
            order = model.selective_layouts(images(), levels(model, level))[-1].cells.argsort()
            assert relative_error(found[order], dense) < 1e-12, stride
    fine = model(images(), levels(model, len(strides) - 1))
    assert relative_error(fine, model.dense(images(), strides[0])) < 1e-12


@torch.no_grad()
def test_the_lattice_depends_on_the_mask() -> None:
    """P1 does not hold, and a run under another rule does not change the network."""
    model = network()
    coarse = model.start(images()).follow(Way.dense(16)).stage_rows()[-1]
    lattice = slice(coarse.shape[0])
    mixed = model.start(images()).take(levels(model)).stage_rows()[-1][lattice]
    assert relative_error(mixed, coarse) > 0.05
    other = model.start(images()).take(levels(model), Way(exchange="none")).stage_rows()[-1][lattice]
    assert relative_error(other, coarse) < 1e-12


@pytest.mark.parametrize("strides", [[8, 16], [8, 16, 32]], ids=str)
@torch.no_grad()
def test_fast_networks_are_equal(strides: list[int]) -> None:
    model = network(strides=strides, shortcut="avg_pool")
    expected, found = (one(images(), levels(model)) for one in (model, model.for_inference()))
    assert relative_error(found, expected) < 1e-11


@pytest.mark.parametrize(("policy", "train"), [("confidence", False), ("confidence", True), ("gain", False)])
@torch.no_grad()
def test_policies_that_read_a_coarse_pass_run_two(policy: str, train: bool) -> None:
    """The mask is the one that the dense coarse network asks for, and both passes count."""
    mask = {"policy": policy, "fine_fraction": 0.3}
    model, given = network(mask=mask), images()
    expected = network(mask=mask, exchange="linear").start(given).follow().levels
    run = model.train(train).start(given).follow()
    assert torch.equal(run.levels, expected)
    if train:
        return
    again = model.start(given).take(expected)
    assert relative_error(run.logits(), again.logits()) < 1e-12
    coarse, macs = count_macs(model, given, Way.dense(16)), again.macs()
    shared = sum(coarse[part] for part in ("stem", "layer1", "layer2"))
    both = sum(run.macs().values()) - run.macs()["mask"]  # of gain's own net
    assert both == sum(coarse.values()) - shared + sum(macs.values())


@torch.no_grad()
def test_a_rule_given_by_the_way() -> None:
    """A network of another rule, too, runs confidence in two passes under this one."""
    model = network(exchange="linear", mask={"policy": "confidence", "fine_fraction": 0.3})
    run = model.start(images()).follow(Way(exchange="separate"))
    assert run.memory is None
    assert run.mask is not None
    expected = model.start(images()).take(run.mask, Way(exchange="separate")).logits()
    assert relative_error(run.logits(), expected) < 1e-12
    refined = model.start(images()).start_coarse()
    with pytest.raises(ValueError, match="exchange separate makes all sites depend on the mask"):
        refined.take(run.mask, Way(exchange="separate")).logits()


def test_what_needs_p1_or_p4_refuses() -> None:
    model = network()
    with pytest.raises(ValueError, match="exchange separate makes coarse sites depend on the mask"):
        next(model.refine(images(), fractions=[0, 0.5]))
    with pytest.raises(ValueError, match="exchange separate makes coarse sites depend on the mask"):
        model.start(images()).take(levels(model), Way(merge="patch"))
    with pytest.raises(SparseSegError, match=r"exchange separate makes the coarse lattice .*--dense only"):
        StaticNetwork(network(), ExportOptions((64, 96)))
    StaticNetwork(network().float(), ExportOptions((64, 96), dense=8))
    with pytest.raises(ConfigError, match="separate, patch: merge patch needs a coarse pass"):
        comparison_ways(model, ["edge"], [0.2], ["linear", "separate"], ["whole", "patch"])
    with pytest.raises(ConfigError, match=r"merge=patch .* model.exchange=separate"):
        build_model({"exchange": "separate", "merge": "patch"})


def test_training_that_needs_the_lattice_refuses(tmp_path) -> None:
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
