"""Converted networks compute what the source's own networks, in plain PyTorch, compute."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.values import Interpreter
from sparse_seg.run.way import Way
from sparse_seg.sites import Grid, Mixed, Sites
from tests.conversion.cases import (
    BACKBONES,
    CASES,
    at_stride,
    converted,
    features,
    network_of,
    stages,
    state_of,
)
from tests.reference import block_mask, relative_error

SIZES = [(64, 96), (67, 93)]
TOLERANCE = 1e-5
SLOW = pytest.mark.slow
FAST = (  # one of each source
    *("torchvision deeplabv3", "vainf deeplabv3plus separable", "smp deeplabv3plus"),
    *("mmseg deeplabv3plus r18", "cad edge mask 16"),
)


def images_of(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def blocks_of(images: Tensor, kind: str) -> Tensor:
    return block_mask(kind, (2, -(-images.shape[2] // 16), -(-images.shape[3] // 16)))


def lattice(model: SelectiveNetwork, images: Tensor) -> Tensor:
    """The coarse sites of the last stage under a random mask."""
    geometry, size = model.geometry, (int(images.shape[2]), int(images.shape[3]))
    plans = model.plans(len(images), size, images.device)
    levels = blocks_of(images, "random").long()
    sites = Sites.of_mask(levels, plans, model.exchange, geometry.near(size))
    last = stages(model)[3]
    geometry.kept_rows = geometry.kept_rows | {last}  # a head of 1x1 convolutions needs it no longer
    value = Interpreter(geometry, model.tensors, images).mixed(sites)[last]
    assert isinstance(value, Mixed)
    assert isinstance(value.lattice, Grid)
    return value.lattice.tensor


@pytest.mark.parametrize(
    "name", [one if one in FAST else pytest.param(one, marks=pytest.mark.slow) for one in CASES]
)
@torch.no_grad()
def test_a_network(name: str, tmp_path: Path) -> None:
    """Logits at the source's own stride, dense, and all-fine where that is 8; at the other one; and P1."""
    case = CASES[name]
    model = converted(state_of(name), tmp_path, case.source, **case.options)
    for images in map(images_of, SIZES):
        expected = network_of(name)(images)
        assert expected.std() > 0.05
        assert relative_error(expected[0], expected[1]) > 0.1, "logits must depend on the image"
        assert relative_error(model.dense(images, case.stride), expected) < TOLERANCE
        if case.stride == 8:
            assert relative_error(model(images, blocks_of(images, "full")), expected) < TOLERANCE
    check_other_stride(name, model, images)
    found, coarse, fine = lattice(model, images), *(features(model, images, one)[3] for one in (16, 8))
    errors = relative_error(found, coarse), relative_error(found, fine[:, :, ::2, ::2])
    assert max(errors) < TOLERANCE if case.p1 else min(errors) > 1e-3
    assert model.geometry.refines == case.p1


def check_other_stride(name: str, model: SelectiveNetwork, images: Tensor) -> None:
    """Logits before upsampling; features alone where the head upsamples inside, by the trained offset, and in
    smp's networks, whose entries are spaced by the output stride they were trained at."""
    own, other = CASES[name].stride, 24 - CASES[name].stride
    if name.startswith("smp"):
        if own == 8:  # sampled, they are those of the same weights at 16
            expected = network_of(name).encoder(images)[3][:, :, ::2, ::2]
            assert relative_error(features(model, images, 16)[3], expected) < TOLERANCE
        return
    network = at_stride(name, other)
    expected = network.backbone_of()(images)
    found = model.start(images).follow(Way.dense(other)).grid_logits()
    if "deeplabv3plus" in name:
        assert found.shape == network.grid_logits(expected).shape
        assert relative_error(features(model, images, other)[3], expected[3]) < TOLERANCE
    else:
        assert relative_error(found, network.grid_logits(expected)) < TOLERANCE


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_features_of_classifiers(name: str, tmp_path: Path) -> None:
    """Every stage at output stride 32; finer, sampled at multiples of 32 px, they are the same (P1)."""
    model, images = converted(state_of(name), tmp_path, BACKBONES[name].source), images_of(SIZES[1])
    expected = network_of(name)(images)
    for found, grid in zip(features(model, images, 32), expected, strict=True):
        assert relative_error(found, grid) < TOLERANCE
    for stride in (8, 16):
        step = 32 // stride
        sampled = features(model, images, stride)[3][:, :, ::step, ::step]
        assert relative_error(sampled, expected[3]) < TOLERANCE
    assert relative_error(lattice(model, images)[:, :, ::2, ::2], expected[3]) < TOLERANCE
