"""Converted networks compute what the source's own networks, in plain PyTorch, compute."""

import functools

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_seg import load_model
from sparse_seg.checkpoint import load_backbone
from sparse_seg.conversion import convert, to_dense, write_dense
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.values import Interpreter
from sparse_seg.run.way import Way
from sparse_seg.sites import Grid, Mixed, Sites
from tests.conversion.cases import BACKBONES, CASES, at_stride, features, network_of, stages, state_of
from tests.reference import block_mask, relative_error

SIZES = [(64, 96), (67, 93), (33, 48)]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("converted")


@functools.cache
def converted(name: str, folder) -> SelectiveNetwork:
    case = (CASES | BACKBONES)[name]
    source = folder / f"{name}.pth"
    torch.save(state_of(name), source)
    missing = ["head"] if name in BACKBONES else []
    conversion = convert(source, allow_missing=missing, **case.options)
    assert conversion.source == case.source
    conversion.write(source.with_suffix(".safetensors"))
    path = source.with_suffix(".safetensors")
    return load_backbone(path) if name in BACKBONES else load_model(path)


def images_of(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def all_fine(size: tuple[int, int]) -> Tensor:
    return block_mask("full", (2, -(-size[0] // 16), -(-size[1] // 16)))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_at_the_sources_own_stride(name, size, folder):
    """Dense, and all-fine where that is output stride 8."""
    model, images, stride = converted(name, folder), images_of(size), CASES[name].stride
    expected = network_of(name)(images)
    assert expected.std() > 0.05
    assert relative_error(expected[0], expected[1]) > 0.1, "logits must depend on the image"
    assert relative_error(model.dense(images, stride), expected) < TOLERANCE
    if stride == 8:
        assert relative_error(model(images, fine_blocks=all_fine(size)), expected) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("smp")])
@torch.no_grad()
def test_logits_before_upsampling_at_the_other_stride(name, folder):
    model, images, stride = converted(name, folder), images_of((67, 93)), 24 - CASES[name].stride
    network = at_stride(name, stride)
    expected = network.grid_logits(network.backbone_of()(images))
    found = model.start(images).follow(Way.dense(stride)).grid_logits()
    if "deeplabv3plus" in name:  # its head upsamples inside, where the trained offset counts as well
        assert found.shape == expected.shape
        assert (
            relative_error(features(model, images, stride)[3], network.backbone_of()(images)[3]) < TOLERANCE
        )
    else:
        assert relative_error(found, expected) < TOLERANCE


def lattice(model: SelectiveNetwork, images: Tensor, blocks: Tensor) -> Tensor:
    """The coarse sites of the last stage under a mask."""
    geometry, size = model.geometry, (int(images.shape[2]), int(images.shape[3]))
    plans = model.plans(len(images), size, images.device)
    sites = Sites.of_mask(blocks.long(), plans, model.exchange, geometry.near(size))
    last = stages(model)[3]
    geometry.kept_rows = geometry.kept_rows | {last}  # a head of 1x1 convolutions needs it no longer
    value = Interpreter(geometry, model.tensors, images).mixed(sites)[last]
    assert isinstance(value, Mixed)
    assert isinstance(value.lattice, Grid)
    return value.lattice.tensor


@pytest.mark.parametrize("name", ["smp deeplabv3", "smp deeplabv3 separable", "smp deeplabv3plus 8"])
@torch.no_grad()
def test_smps_features_at_the_other_stride(name, folder):
    """smp's entries are spaced by the output stride it was trained at; its features at 8, sampled, are
    those of the same weights at 16."""
    model, images = converted(name, folder), images_of((67, 93))
    expected = network_of(name).encoder(images)[3][:, :, ::2, ::2]
    assert relative_error(features(model, images, 16)[3], expected) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_p1(name, folder):
    """Coarse sites are those of the dense network of output stride 16, or the network is known not to."""
    model, images = converted(name, folder), images_of((67, 93))
    found = lattice(model, images, block_mask("random", (2, 5, 6)))
    errors = [
        relative_error(found, features(model, images, 16)[3]),
        relative_error(found, features(model, images, 8)[3][:, :, ::2, ::2]),
    ]
    assert max(errors) < TOLERANCE if CASES[name].p1 else min(errors) > 1e-3
    assert model.geometry.refines == CASES[name].p1


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_features_of_classifiers(name, size, folder):
    """Every stage at output stride 32; finer, sampled at multiples of 32 px, they are the same (P1)."""
    model, images = converted(name, folder), images_of(size)
    expected = network_of(name)(images)
    for found, grid in zip(features(model, images, 32), expected, strict=True):
        assert relative_error(found, grid) < TOLERANCE
    for stride in (8, 16):
        step = 32 // stride
        sampled = features(model, images, stride)[3][:, :, ::step, ::step]
        assert relative_error(sampled, expected[3]) < TOLERANCE
    found = lattice(model, images, block_mask("random", (2, -(-size[0] // 16), -(-size[1] // 16))))
    assert relative_error(found[:, :, ::2, ::2], expected[3]) < TOLERANCE


@pytest.mark.parametrize("name", CASES | BACKBONES)
def test_the_way_back(name, folder):
    """Bit for bit, all of them; classifiers as safetensors, the others as PyTorch's file."""
    converted(name, folder)
    dense, expected = to_dense(folder / f"{name}.safetensors"), state_of(name)
    path = folder / ("back.safetensors" if name in BACKBONES else "back.pth")
    write_dense(path, dense)
    back = load_file(path) if name in BACKBONES else torch.load(path, weights_only=True)
    assert dense.keys() == back.keys() == expected.keys()
    for key, tensor in expected.items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor), key
