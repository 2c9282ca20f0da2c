"""The plain dense twin gives the numbers of our dense and all-fine networks."""

import copy

import pytest
import torch
from torch import nn

from sparse_seg.models.plain import plain_network, plain_stages
from sparse_seg.sparse import SelectiveConv2d, grid_to_rows, rows_to_grid
from tests.reference import VARIANTS, block_mask, random_model, relative_error, variant_model

SIZES = [(64, 96), (65, 97), (47, 101)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("head", ["lite", "deeplabv3"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@torch.no_grad()
def test_equals_the_dense_and_the_all_fine_network(backbone, head, size, device):
    model = random_model(backbone, head, 0.25, torch.float64, device)
    images = torch.randn(2, 3, *size, dtype=torch.float64, device=device)
    plain = plain_network(model)
    assert relative_error(plain(images), model.dense(images)) < 1e-12
    blocks = block_mask("full", (2, -(-size[0] // 16), -(-size[1] // 16))).to(device)
    assert relative_error(plain(images), model(images, fine_blocks=blocks)) < 1e-12


@pytest.mark.parametrize("output_stride", [16, 32])
@pytest.mark.parametrize("head", ["lite", "deeplabv3"])
@torch.no_grad()
def test_other_output_strides(head, output_stride):
    model = random_model("resnet50", head, 0.25, torch.float64)
    images = torch.randn(1, 3, 65, 97, dtype=torch.float64)
    assert relative_error(plain_network(model, output_stride)(images), model.dense(images, output_stride)) < (
        1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_variants(variant, size):
    model = variant_model(variant)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    plain = plain_network(model)
    assert relative_error(plain(images), model.dense(images)) < 1e-12
    blocks = block_mask("full", (2, -(-size[0] // 16), -(-size[1] // 16)))
    assert relative_error(plain(images), model(images, fine_blocks=blocks)) < 1e-12
    for stride in (16, 32):
        assert relative_error(plain_network(model, stride)(images), model.dense(images, stride)) < 1e-12


@pytest.mark.parametrize("output_stride", [8, 16])
@torch.no_grad()
def test_the_last_stages_alone(output_stride):
    backbone = random_model("resnet50", width=0.25, dtype=torch.float64).backbone
    model = random_model("resnet50", width=0.25, dtype=torch.float64)
    images = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    layouts = model.dense_layouts(images, output_stride)
    rows = backbone(images, layouts)
    grid = rows_to_grid(rows[1], 2, layouts[1].size)
    before = grid.clone()
    out = plain_stages(backbone, output_stride, first=2).eval()(grid)
    assert relative_error(grid_to_rows(out), rows[3]) < 1e-12
    assert torch.equal(grid, before)


def test_it_is_plain_channels_last_and_its_own():
    model = random_model("resnet50", "deeplabv3")
    plain = plain_network(model)
    assert not any(isinstance(m, (SelectiveConv2d, nn.Linear, nn.BatchNorm1d)) for m in plain.modules())
    convs = [m for m in plain.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)
    assert not plain.training
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())
    ours = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in ours for p in plain.parameters())


def test_gradients_equal_in_training():
    """Batch statistics and gradients too: it is the training baseline."""
    model = copy.deepcopy(random_model("resnet18", "deeplabv3", dtype=torch.float64)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its draws would differ
    plain = plain_network(model)
    assert plain.training
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    gradients = []
    for network, run in ((plain, plain), (model, model.dense)):
        run(images).square().sum().backward()
        gradients.append(next(p.grad for p in network.parameters() if p.shape[1:] == (3, 7, 7)))
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert relative_error(gradients[0], gradients[1]) < 1e-9
