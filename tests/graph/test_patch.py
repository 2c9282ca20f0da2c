"""Merge `patch` of our heads and decoders: P2 on logits at all levels, P4, gradients, costs, training."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

import sparse_seg
from sparse_seg.registry import HEADS
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from tests.conversion.cases import randomise
from tests.graph.toys import decoding
from tests.reference import relative_error, without_dropout

PATCH = Way(merge="patch")
STRIDES = ((8, 16), (8, 16, 32), (4, 8, 16))
DECODERS: dict[str, dict[str, bool]] = {
    "decoder": {},
    "aligned": {"align_corners": True},
    "no skip": {"skip": False},
    "nearest": {"nearest": True},
    "dip": {"dip": True},
}
FORMS = [*HEADS.declared, *DECODERS]
FAST = list(zip(FORMS, itertools.cycle(STRIDES[:2])))  # one choice of strides each
FORMS_AND_STRIDES = [
    (form, one) if (form, one) in FAST else pytest.param(form, one, marks=pytest.mark.slow)
    for form in FORMS
    for one in STRIDES
    if one[0] == 8 or form not in DECODERS
]
PAIRS = FAST[: len(HEADS.declared) + 1]


def network(form: str, strides: Sequence[int]) -> SelectiveNetwork:
    """Of a head of ours or a decoder, with random weights and statistics, in eval mode and float64."""
    torch.manual_seed(0)
    return copy.deepcopy(_network(form, tuple(strides)))


@functools.cache  # capturing takes longer than what is tested
def _network(form: str, strides: tuple[int, ...]) -> SelectiveNetwork:
    if form in DECODERS:
        return decoding(strides, **DECODERS[form])
    small = {"backbone": "resnet18", "depths": [1, 1, 2, 2], "width": 0.125, "head_channels": 12}
    torch.manual_seed(0)
    model = sparse_seg.build_model(small | {"head": form, "num_classes": 5, "strides": list(strides)})
    randomise(model)
    return model.double().eval()


def images(height: int = 43, width: int = 70) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64)


def levels(net: SelectiveNetwork, given: Tensor, seed: int = 0) -> Tensor:
    block, highest = net.strides[-1], len(net.strides)
    size = (given.shape[0], *(-(-length // block) for length in given.shape[2:]))
    return torch.randint(0, highest, size, generator=torch.Generator().manual_seed(seed))


def norms(net: SelectiveNetwork, kind: str) -> Iterator[str]:
    """Names of the statistics of norms on values of a kind."""
    for node in net.graph.nodes:
        if node.op == "batch_norm" and net.geometry.kind[node.name] == kind:
            yield from (name for role, name in node.tensors.items() if role.startswith(("running", "num")))


@pytest.mark.parametrize(("form", "strides"), FORMS_AND_STRIDES, ids=str)
def test_all_blocks_at_one_level_are_the_dense_network_and_one_step_equals_two(
    form: str, strides: tuple[int, ...]
) -> None:
    """P2 at each level and P4: refined, with autograd, where nothing is kept, and in the fast form."""
    net, given = network(form, strides), images()
    mask, fast = levels(net, given), net.for_inference()
    for level, stride in enumerate(reversed(strides)):
        dense, alike = net.dense(given, stride), torch.full_like(mask, level)
        assert relative_error(net.start(given).take(alike, PATCH).logits(), dense) < 1e-12, stride
        with torch.inference_mode():
            for one in (net, fast):
                assert relative_error(one.start(given).take(alike, PATCH).logits(), dense) < 1e-12, stride
    with torch.inference_mode():
        once = net.start(given).take(mask, PATCH).logits()
        for run in (net.start(given).start_coarse(), fast.start(given)):
            assert relative_error(run.take(mask, PATCH).logits(), once) < 1e-12
            assert relative_error(run.take(mask, Way()).logits(), net(given, mask)) < 1e-12, "whole again"
    assert relative_error(net.start(given).take(mask, PATCH).logits(), once) < 1e-12


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize(("form", "strides"), PAIRS, ids=str)
def test_gradients_are_those_of_finite_differences(
    form: str, strides: tuple[int, ...], training: bool
) -> None:
    net, given = network(form, strides), images(53, 64)
    if training:
        without_dropout(net)
    mask = levels(net, given)
    target = torch.randn_like(net.start(given).take(mask, PATCH).logits())

    def loss() -> Tensor:
        return (net.start(given).take(mask, PATCH).logits() * target).sum()

    loss().backward()  # the step below crosses hardly any of the ReLUs' kinks
    with torch.no_grad():
        steps = [(weight, 1e-8 * torch.randn_like(weight)) for weight in net.parameters()]
        expected = sum((weight.grad * step).sum().item() for weight, step in steps if weight.grad is not None)
        values = []
        for sign in (1, -1):
            for weight, step in steps:
                weight.add_(sign * step)
            values.append(loss().item())
            for weight, step in steps:
                weight.sub_(sign * step)
    assert (values[0] - values[1]) / 2 == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_the_second_head_costs_its_share() -> None:
    """That of the fine blocks; places outside the image cost nothing."""
    for head in HEADS.declared:
        net, given = network(head, [8, 16]), images(96, 128)
        mask = levels(net, given).bool()
        run, half = net.start(given).take(mask, PATCH), net.start(given).start_coarse()
        dense = net.start(given).follow(Way.dense(8)).macs().get("late", 0)
        run_late, half_late = (one.macs().get("late", 0) for one in (run, half))
        assert run_late - half_late == dense * mask.double().mean().item(), head
    net, given = network("lite", [8, 16, 32]), images(75, 101)
    run = net.start(given).take(torch.full_like(levels(net, given), 2), PATCH)
    each = [net.start(given).follow(Way.dense(stride)).macs()["late"] for stride in net.strides]
    assert run.macs()["late"] == sum(each)


@torch.no_grad()
def test_a_pass_starts_the_coarse_one_and_refines_it() -> None:
    net, given = network("deeplabv3plus", [8, 16]), images(64, 96)
    more = levels(net, given).bool()
    some = more & levels(net, given, 1).bool()
    run = net.start(given).take(some, PATCH)
    rows = run.macs()["rows"]
    run.take(more, PATCH)
    assert run.memory is not None
    assert rows < run.macs()["rows"] < 1.1 * net.start(given).take(more, PATCH).macs()["rows"]
    with pytest.raises(ValueError, match="a step can only refine"):
        run.take(some, PATCH)
    begun = net.start(given).start_coarse().take(more)  # a coarse pass without late values
    assert (
        relative_error(begun.take(more, PATCH).logits(), net.start(given).take(more, PATCH).logits()) < 1e-12
    )


@pytest.mark.parametrize(("head", "strides"), [*zip(HEADS.declared, itertools.cycle(STRIDES))], ids=str)
def test_training_updates_statistics_once_those_of_rows_by_all_sites(
    head: str, strides: tuple[int, ...]
) -> None:
    """As merge `whole` does, whose rows are the same."""
    net, given = network(head, strides).train(), images(64, 96)
    mask, after = levels(net, given), []
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for merge in ("patch", "whole"):
        net.load_state_dict(before, strict=False)
        net.start(given).take(mask, Way(merge=merge)).logits()
        after.append({name: tensor.clone() for name, tensor in net.tensors.items()})
    rows = list(norms(net, "rows"))
    assert all(torch.equal(after[0][name], after[1][name]) for name in rows)
    assert len(rows) > 10
    for name in norms(net, "late"):
        if name.endswith("num_batches_tracked"):
            assert after[0][name] == after[1][name], name
        else:
            assert not torch.equal(after[0][name], before[f"module.{name}"]), name


@torch.no_grad()
def test_statistics_count_no_place_outside_the_image() -> None:
    """All fine they are those of the coarse and of the fine grid together; the other norms are frozen."""
    net, given = network("lite", [8, 16]), images(75, 101)
    late = set(norms(net, "late"))
    name, means = min(one for one in late if one.endswith("running_mean")), []
    for module in net.train().modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train(module is net.module.get_submodule(name.rpartition(".")[0]))
    mask = torch.ones_like(levels(net, given))
    for run in (Way.dense(16), Way.dense(8), None):
        before = net.tensors[name].clone()
        (net.start(given).take(mask, PATCH) if run is None else net.start(given).follow(run)).logits()
        means.append(net.tensors[name] - 0.9 * before)
    coarse, fine = 5 * 7, 10 * 13
    assert relative_error(means[2], (coarse * means[0] + fine * means[1]) / (coarse + fine)) < 1e-12
