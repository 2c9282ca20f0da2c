"""Merge `patch`: P2 on logits at both ends, P4, and each block's logits against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg import build_model
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.registry import HEADS
from tests.reference import randomise, relative_error

STRIDES = ([8, 16], [8, 16, 32], [4, 8, 16])


def network(head: str, strides: list[int], **more: Any) -> SelectiveNetwork:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"backbone": "resnet18", "width": 0.125, "head_channels": 12, "num_classes": 5}
    model = build_model(settings | {"head": head, "strides": strides, "merge": "patch"} | more)
    randomise(model)
    return model.double().eval()


def images(height: int = 75, width: int = 101) -> Tensor:
    return torch.randn(2, 3, height, width, dtype=torch.float64)


def levels(model: SelectiveNetwork, given: Tensor, seed: int = 0) -> Tensor:
    block, highest = model.strides[-1], len(model.strides)
    size = (given.shape[0], *(-(-length // block) for length in given.shape[2:]))
    return torch.randint(0, highest, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grad", [False, True], ids=["refined", "autograd"])
@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize("head", HEADS.declared)
def test_all_coarse_and_all_fine_are_the_dense_networks(head: str, strides: list[int], grad: bool) -> None:
    model, given = network(head, strides), images()
    mask = levels(model, given)
    with torch.set_grad_enabled(grad):
        coarse = model(given, torch.zeros_like(mask))
        fine = model(given, torch.full_like(mask, len(strides) - 1))
    assert relative_error(coarse, model.dense(given, strides[-1])) < 1e-12
    assert relative_error(fine, model.dense(given, strides[0])) < 1e-12


@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize("head", HEADS.declared)
def test_one_step_equals_two(head: str, strides: list[int]) -> None:
    """P4, and the same logits with autograd, where nothing is kept, and in the fast form."""
    model, given = network(head, strides), images(64, 96)
    mask = levels(model, given)
    with torch.inference_mode():
        once = model.start(given).take(mask).logits()
        run = model.start(given).start_coarse()
        assert relative_error(run.take(mask).logits(), once) < 1e-12
    assert relative_error(model(given, mask), once) < 1e-12
    single, fast = model.float()(given.float(), mask), model.float().for_inference()(given.float(), mask)
    assert relative_error(fast, single) < 1e-5


@pytest.mark.parametrize("head", HEADS.declared)
def test_each_cell_has_the_logits_of_its_own_level(head: str) -> None:
    """On the head's grid: in fine blocks decoded whole, elsewhere the coarse logits, bilinear."""
    model, given = network(head, [8, 16]), images(90, 106)
    mask = levels(model, given).bool()
    patched, whole, coarse = (model.start(given) for _ in range(3))
    patched.take(mask)
    whole.take(mask, Way(merge="whole"))
    coarse.follow(Way.dense(16))
    found, fine, beside = patched.grid_logits(), whole.grid_logits(), coarse.grid_logits()
    size = (int(found.shape[2]), int(found.shape[3]))
    if size != tuple(beside.shape[2:]):  # cell 2i of the finer grid is cell i of the coarser one
        beside = F.pad(beside, (0, 1, 0, 1), mode="replicate")
        full = (2 * beside.shape[2] - 1, 2 * beside.shape[3] - 1)
        beside = F.interpolate(beside, full, mode="bilinear", align_corners=True)[:, :, : size[0], : size[1]]
    factor = -(-size[0] // mask.shape[1])
    inside = mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, None, : size[0], : size[1]]
    assert relative_error(found, torch.where(inside, fine, beside)) < 1e-12


@pytest.mark.parametrize("head", ["lite", "deeplabv3", "fcn"])
def test_gradients_are_those_of_finite_differences(head: str) -> None:
    model, given = network(head, [8, 16]), images(48, 64)
    mask, weight = levels(model, given).bool(), model.head.classifier.weight
    target = torch.randn_like(model(given, mask))
    (model(given, mask) * target).sum().backward()
    assert weight.grad is not None
    step = torch.randn_like(weight)
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight.add_(sign * 1e-6 * step)
            values.append((model(given, mask) * target).sum())
            weight.sub_(sign * 1e-6 * step)
    assert ((values[0] - values[1]) / 2e-6).item() == pytest.approx(
        (weight.grad * step).sum().item(), rel=1e-6
    )


@pytest.mark.parametrize("head", HEADS.declared)
def test_the_second_head_costs_its_share(head: str) -> None:
    """That of the fine blocks, where it can run on their cells alone."""
    model, given = network(head, [8, 16]), images(96, 128)
    mask = levels(model, given).bool()
    with torch.inference_mode():
        run = model.start(given).take(mask)
        half = model.start(given).start_coarse()
        dense = model.start(given).follow(Way.dense(8)).macs()["head"]
        second = run.macs()["head"] - half.macs()["head"]
    share = mask.double().mean().item() if head != "deeplabv3plus" else 1.0
    assert second == pytest.approx(dense * share, rel=0.01)


@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize("head", HEADS.declared)
def test_training_updates_the_necks_statistics_once_by_all_sites(head: str, strides: list[int]) -> None:
    """As merge `whole` does, whose neck is the same."""
    model, given = network(head, strides).train(), images(64, 96)
    mask, after = levels(model, given), []
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for merge in ("patch", "whole"):
        model.load_state_dict(before, strict=False)
        model.start(given).take(mask, Way(merge=merge)).logits()
        necks = [model.head.get_submodule(name) for name in model.head.NECK]
        after.append([buffer.clone() for neck in necks for buffer in neck.buffers()])
    assert len(after[0]) == len(after[1])
    assert all(torch.equal(patch, whole) for patch, whole in zip(*after, strict=True))
    assert len(after[0]) > 0 or head == "fcn"
