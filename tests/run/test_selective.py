"""P3 and training: the selective network against the slow one, values and gradients."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.sites import Mixed
from tests.reference import (
    DenseSegmentor,
    as_reference,
    at_sites,
    dense_reference,
    random_model,
    relative_error,
    stage_values,
)
from tests.slow_reference import SlowSelective

EXCHANGES = ("linear", "nearest", "none", "separate")
CONFIGS = [("resnet18", "lite"), ("resnet18", "deeplabv3"), ("resnet50", "lite")]


def random_case(size: tuple[int, int], seed: int, share: float) -> tuple[Tensor, Tensor]:
    """Two images and a random mask of their blocks."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=generator)
    mask = torch.rand(2, -(-size[0] // 16), -(-size[1] // 16), generator=generator) < share
    return images, mask


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("backbone", "head"), CONFIGS)
@settings(max_examples=3)
@given(
    size=st.tuples(st.integers(32, 80), st.integers(32, 110)),
    seed=st.integers(0, 1000),
    share=st.floats(0.05, 0.95),
)
@torch.no_grad()
def test_exchange_rules(
    backbone: str, head: str, exchange: str, size: tuple[int, int], seed: int, share: float
) -> None:
    """Every site under any mask, and the logits, equal the slow reference."""
    model = random_model(backbone, head, dtype=torch.float64, exchange=exchange)
    slow = SlowSelective(dense_reference(model, 8, backbone, head), exchange)
    images, mask = random_case(size, seed, share)
    run, expected = model.start(images).take(mask), slow.features(images, mask)
    for ours, theirs, sites in zip(stage_values(run)[2:], expected, slow.stage_sites, strict=True):
        assert isinstance(ours, Mixed)
        assert relative_error(at_sites(ours, sites), theirs) < 1e-11
    assert relative_error(run.logits(), slow.logits(images, mask)) < 1e-11


@torch.no_grad()
def test_exchange_rules_differ() -> None:
    """Otherwise the test above would prove nothing."""
    images, mask = random_case((70, 101), 3, 0.4)
    logits = [
        random_model(dtype=torch.float64, exchange=exchange)(images, fine_blocks=mask)
        for exchange in EXCHANGES
    ]
    for first, second in itertools.combinations(logits, 2):
        assert relative_error(first, second) > 1e-2


def _training_pair(
    backbone: str, head: str, exchange: str, train: bool
) -> tuple[SelectiveNetwork, DenseSegmentor]:
    model = copy.deepcopy(random_model(backbone, head, dtype=torch.float64, exchange=exchange))
    model.train(train)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # in training mode, too
    return model, dense_reference(model, 8, backbone, head)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("backbone", "head"), CONFIGS)
def test_gradients(backbone: str, head: str, exchange: str, train: bool) -> None:
    """Gradients of weights, batch norms and images, and running statistics, as the slow one's."""
    model, reference = _training_pair(backbone, head, exchange, train)
    images, mask = random_case((70, 53), 5, 0.4)
    target = torch.randn(2, 5, 70, 53, dtype=torch.float64)
    ours, theirs = images.clone().requires_grad_(), images.clone().requires_grad_()
    (model(ours, fine_blocks=mask) * target).sum().backward()
    (SlowSelective(reference, exchange).logits(theirs, mask) * target).sum().backward()

    assert ours.grad is not None
    assert theirs.grad is not None
    assert relative_error(ours.grad, theirs.grad) < 1e-9
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    actual = as_reference({name: _grad(parameter) for name, parameter in model.named_parameters()})
    assert actual.keys() == expected.keys()
    largest = max(grad.abs().max().item() for grad in expected.values() if grad is not None)
    for name, grad in expected.items():
        assert grad is not None, name
        if grad.abs().max() > 1e-9 * largest:  # a bias before a batch norm has none
            assert relative_error(actual[name], grad) < 1e-9, name
    statistics = dict(reference.named_buffers())
    for name, buffer in as_reference(dict(model.named_buffers())).items():
        assert torch.allclose(buffer, statistics[name], rtol=1e-9, atol=1e-12), name


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
