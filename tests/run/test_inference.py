"""The form for inference has the same interface and the same numbers."""

import copy

import pytest
import torch

from sparse_seg import build_model
from tests.reference import VARIANTS, randomise, relative_error, variant_model


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "head"), [("resnet18", "lite"), ("resnet50", "deeplabv3")])
@pytest.mark.parametrize("size", [(64, 96), (75, 98)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_same_logits_dense_and_selective(backbone, head, size, dtype):
    torch.manual_seed(0)
    model = build_model({"backbone": backbone, "width": 0.25, "head": head, "num_classes": 5})
    randomise(model)
    model = model.to(dtype).eval()
    before = copy.deepcopy(model.state_dict())
    fast, images = model.for_inference(), torch.randn(2, 3, *size, dtype=dtype)
    pairs = [(model.dense(images, stride), fast.dense(images, stride)) for stride in (8, 16, 32)]
    for fraction in (0, 0.3, 1):
        mask = torch.rand(2, -(-size[0] // 16), -(-size[1] // 16)) < fraction
        pairs.append((model(images, mask), fast(images, mask)))
    pairs.append((model(images), fast(images)))
    for expected, found in pairs:
        assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 1e-12)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_variants(variant):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = variant_model(variant, dtype)
        fast = model.for_inference()
        images = torch.randn(2, 3, 75, 98, dtype=dtype)
        mask = torch.rand(2, 5, 7) < 0.3
        for stride in (8, 16):
            assert relative_error(fast.dense(images, stride), model.dense(images, stride)) < tolerance
        for blocks in (mask, torch.ones_like(mask)):
            assert relative_error(fast(images, blocks), model(images, blocks)) < tolerance
        assert not any(node.op == "batch_norm" for node in fast.graph.nodes), "all are folded"


def test_a_folded_bias_has_a_gradient():
    """Whoever thaws the form's weights gets the right one, on the lattice and on extra sites."""
    model = build_model({"width": 0.125, "num_classes": 5})
    randomise(model)
    fast, images = model.double().eval().for_inference(), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    node = next(node for node in fast.graph.nodes if node.layer == "backbone.layer4.0.conv1")
    bias = fast.tensors[node.tensors["bias"]]
    mask, step = torch.rand(1, 4, 6) < 0.4, 1e-6
    bias.requires_grad_(True)
    fast(images, mask).square().sum().backward()
    assert bias.grad is not None
    found = bias.grad[0].item()
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            bias[0] += sign * step
            values.append(fast(images, mask).square().sum().item())
            bias[0] -= sign * step
    assert found == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model\.eval\(\) before for_inference"):
        build_model({"width": 0.125}).train().for_inference()


def test_copies_moves_and_autocast():
    torch.manual_seed(0)
    model = build_model({"width": 0.125, "num_classes": 5})
    randomise(model)
    fast = model.eval().for_inference()
    images = torch.randn(1, 3, 64, 96)
    expected = fast(images)
    assert torch.equal(copy.deepcopy(fast)(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(images), expected)
    double = fast.double()(images.double())
    assert double.dtype == torch.float64
    assert (double - expected).abs().max() / expected.abs().max() < 1e-5


def test_nothing_wants_gradients_and_images_stay_as_they_are():
    fast = build_model({"width": 0.125}).eval().for_inference()
    images = torch.randn(1, 3, 64, 64)
    before = images.clone()
    assert not fast(images).requires_grad
    assert torch.equal(images, before)
