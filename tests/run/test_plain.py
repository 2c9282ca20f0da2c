"""The module itself, a plain dense network, gives the numbers of the dense and the all-fine pass."""

import copy

import pytest
import torch
from torch import nn

from sparse_seg.networks.segmenter import Segmenter, build_module
from sparse_seg.run.network import SelectiveNetwork
from tests.reference import VARIANTS, block_mask, random_model, relative_error, variant_model

SIZES = [(64, 96), (47, 101)]


def twin(model: SelectiveNetwork, output_stride: int) -> Segmenter:
    """The plain network of the same weights at an output stride."""
    plain = build_module(model.settings, output_stride).to(next(model.parameters()))
    plain.load_state_dict(model.module.state_dict())
    return plain.train(model.training)


def check(model: SelectiveNetwork, size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size).to(next(model.parameters()))
    for stride in (4, 8, 16, 32):
        assert relative_error(model.dense(images, stride), twin(model, stride)(images)) < 1e-12, stride
    blocks = block_mask("full", (2, -(-size[0] // 16), -(-size[1] // 16)))
    assert relative_error(model(images, blocks), twin(model, 8)(images)) < 1e-12


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("backbone", "head"), [("resnet18", "lite"), ("resnet50", "deeplabv3")])
@torch.no_grad()
def test_equals_the_dense_and_the_all_fine_network(backbone, head, size, device):
    check(random_model(backbone, head, dtype=torch.float64, device=device), size)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_variants(variant, size):
    check(variant_model(variant), size)


def test_gradients_equal_in_training():
    """Batch statistics and gradients too."""
    model = copy.deepcopy(random_model("resnet18", "deeplabv3", dtype=torch.float64)).train()
    plain = twin(model, 8)
    for module in (*model.modules(), *plain.modules()):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # its draws would differ
    images, gradients = torch.randn(2, 3, 64, 96, dtype=torch.float64), []
    for network, run in ((plain, plain), (model.module, model.dense)):
        run(images).square().sum().backward()
        gradients.append(
            {name: grad for name, one in network.named_parameters() if (grad := one.grad) is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() == dict(plain.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-9, name
