"""Learning rate, optimiser groups and losses against their formulas."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_seg.config import LossConfig, TrainConfig
from sparse_seg.training.losses import SegmentationLoss, hard_pixels, near_boundary
from sparse_seg.training.schedule import build_optimizer, learning_rate, update_average


def test_poly_schedule_with_warm_up():
    config = TrainConfig(iterations=100, lr=0.5, warmup_iterations=4, poly_power=0.9)
    rates = [learning_rate(i, config) for i in range(100)]
    assert rates[0] == pytest.approx(0.5 / 5)
    assert rates[3] == pytest.approx(0.5 * 4 / 5 * 0.97**0.9)
    assert rates[50] == pytest.approx(0.5 * 0.5**0.9)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[4:]))


def test_a_tensor_of_two_names_is_averaged_once():
    pair = []
    for value in (0.0, 1.0):
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        nn.init.constant_(first.weight, value)
        second.weight = first.weight
        pair.append(nn.Sequential(first, second))
    average, model = pair
    update_average(average, model, 0.9, 10**6)
    assert torch.allclose(average.state_dict()["1.weight"], torch.full((2, 2), 0.1))


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_no_weight_decay_on_norms_and_biases(name, kind):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = build_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.3))
    assert isinstance(optimizer, kind)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [0.3, 0, 0, 0]


@pytest.fixture
def logits():
    return torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    labels = torch.randint(0, 3, (2, 5, 6), generator=torch.Generator().manual_seed(1))
    labels[:, 0] = 255
    return labels


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(),
        LossConfig(class_weights=[1, 2, 0.5]),
        LossConfig(auxiliary_weight=0.25, coarse_weight=0.5),
        LossConfig(boundary_weight=2.0, boundary_width=2, fine_weight=0.5, class_weights=[1.0, 2.0, 0.5]),
    ],
    ids=["plain", "classes", "other logits", "stress on detail"],
)
def test_the_loss_is_its_definition(logits, labels, config):
    generator = torch.Generator().manual_seed(2)
    auxiliary, coarse = (torch.randn(2, 3, 5, 6, generator=generator) for _ in range(2))
    fine = torch.rand(2, 5, 6, generator=generator) < 0.3
    classes = torch.tensor(config.class_weights or [1.0] * 3)[labels.where(labels != 255, 0)] * (
        labels != 255
    )
    stress = (
        1 + config.boundary_weight * near_boundary(labels, config.boundary_width) + config.fine_weight * fine
    )

    def mean(logits, weights):
        losses = F.cross_entropy(logits.double(), labels, ignore_index=255, reduction="none")
        return (losses * weights).sum() / weights.sum()

    expected = mean(logits, classes * stress) + config.auxiliary_weight * mean(auxiliary, classes)
    expected = expected + config.coarse_weight * mean(coarse, classes)
    found = SegmentationLoss(config)(logits, labels, auxiliary, coarse, fine)
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize(
    "config", [LossConfig(), LossConfig(ohem_threshold=0.7), LossConfig(class_weights=[1, 1, 1])]
)
def test_a_batch_without_labels_has_loss_zero_and_gradients(logits, config):
    logits.requires_grad_()
    loss = SegmentationLoss(config)(logits, torch.full((2, 5, 6), 255))
    loss.backward()
    assert loss == 0
    assert torch.count_nonzero(logits.grad) == 0


def test_ohem_keeps_hard_pixels_only(logits, labels):
    losses = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")[labels != 255]
    hard = losses[losses.neg().exp() < 0.4]
    assert 0.1 * losses.numel() < hard.numel() < losses.numel()
    loss = SegmentationLoss(LossConfig(ohem_threshold=0.4))(logits, labels)
    torch.testing.assert_close(loss, hard.mean())


def test_ohem_keeps_a_least_share_and_sorts_only_then(monkeypatch):
    losses = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert hard_pixels(losses, math.exp(-9), 0.5).mean() == pytest.approx(0.35)
    assert hard_pixels(losses[:2], math.exp(-9), 0.0).mean() == pytest.approx(0.2), "no nan"
    monkeypatch.setattr(torch.Tensor, "topk", None)
    assert hard_pixels(losses, math.exp(-0.25), 0.5).mean() == pytest.approx(0.35)
