"""The form for inference; its numbers: `tests/test_parts.py`."""

import copy

import pytest
import torch
from torch import Tensor

from sparse_seg import build_model
from sparse_seg.run.network import SelectiveNetwork
from tests.reference import random_model, relative_error

MASK = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.3


def fresh(backbone: str = "resnet18", head: str = "lite") -> SelectiveNetwork:
    torch.manual_seed(0)  # of the images that follow
    return copy.deepcopy(random_model(backbone, head))


def test_a_folded_bias_has_a_gradient():
    """Whoever thaws the form's weights gets the right one, on the lattice and on extra sites."""
    fast, images = fresh().double().for_inference(), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    node = next(node for node in fast.graph.nodes if node.layer == "backbone.layer4.0.conv1")
    bias, step, values = fast.tensors[node.tensors["bias"]], 1e-6, []
    bias.requires_grad_(True)
    fast(images, MASK).square().sum().backward()
    assert bias.grad is not None
    with torch.no_grad():
        for sign in (1, -1):
            bias[0] += sign * step
            values.append(fast(images, MASK).square().sum().item())
            bias[0] -= sign * step
    assert bias.grad[0].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_what_trains_is_not_folded_and_what_is_folded_does_not_train():
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first: batch norm"):
        build_model({"width": 0.125}).train().for_inference()
    fast = fresh().for_inference()
    assert fast.for_inference() is fast
    assert not fast.eval().training
    with pytest.raises(ValueError, match="cannot train: train the one it was made of"):
        fast.train()


def test_copies_moves_autocast_and_no_gradients():
    fast, images = fresh().for_inference(), torch.randn(1, 3, 64, 96)
    before, expected = images.clone(), fast(images)
    assert not expected.requires_grad
    assert torch.equal(images, before)
    assert torch.equal(copy.deepcopy(fast)(images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(images), expected)
    assert relative_error(fast.double()(images.double()), expected.double()) < 1e-5


def all_ways(model: SelectiveNetwork, images: Tensor) -> list[Tensor]:
    refined = model.start(images).start_coarse().take(MASK)
    return [model.dense(images, 8), model(images, MASK), refined.logits(), *model.refine(images, [0, 0.2])]


@pytest.mark.parametrize(
    ("backbone", "head"),
    [("resnet18", "lite"), pytest.param("resnet50", "deeplabv3", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("fault", ["pixel", "infinite pixel", "overflow in layer1", "overflow in layer4"])
@torch.no_grad()
def test_it_hides_nothing_that_is_not_finite(fault: str, backbone: str, head: str) -> None:
    model, images = fresh(backbone, head), torch.randn(1, 3, 64, 96)
    if "pixel" in fault:
        images[0, 0, 40, 40] = torch.nan if fault == "pixel" else torch.inf
    else:  # infinity minus infinity behind it: NaN that arises inside, from finite weights and images
        model.get_parameter(f"module.backbone.{fault[-6:]}.0.bn1.weight").mul_(1e38)
    plain, fast = all_ways(model, images), all_ways(model.for_inference(), images)
    for expected, found in zip(plain, fast, strict=True):
        assert not expected.isfinite().all()
        assert torch.equal(found.isfinite(), expected.isfinite())


@pytest.mark.slow
@torch.inference_mode()
def test_a_dense_run_compiles_as_one_graph():
    model, images = fresh(), torch.randn(1, 3, 64, 96)
    expected = model.dense(images, 8)
    compiled = torch.compile(lambda images: model.dense(images, 8), fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), expected)
