"""Training a learned mask: losses against plain definitions, gradients, budget, checkpoints."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg import build_model
from sparse_seg.config import LossConfig
from sparse_seg.evaluation.cost import count_macs
from sparse_seg.masks import LearnedPolicy, block_mean, straight_through
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.training import objective
from sparse_seg.training.losses import SegmentationLoss
from sparse_seg.training.objective import straight_through_loss, supervised_loss
from tests.reference import randomise, relative_error


def learned_model(**settings: object) -> SelectiveNetwork:
    torch.manual_seed(0)
    mask = {"policy": "learned", "fine_fraction": 0.25}
    model = build_model({"width": 0.125, "num_classes": 5, "head_channels": 16, "mask": mask} | settings)
    randomise(model)
    return model.double()


def batch(size: tuple[int, int] = (64, 96)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, 5, (2, *size), generator=generator)


@pytest.mark.parametrize("strides", [[8, 16, 32], [4, 8, 16]], ids=str)
@torch.no_grad()
def test_segment_with_a_learned_mask(strides: list[int]) -> None:
    """The mask is a cut of the net's scores of the dense features; the result is the network's under it."""
    model = learned_model(strides=strides)
    images, _ = batch((70, 101))
    run = model.start(images).follow()
    logits, chosen = run.logits(), run.mask
    assert chosen is not None
    policy = model.policy
    assert isinstance(policy, LearnedPolicy)
    stage = 0 if strides[0] == 4 else 1
    features = model.module.get_submodule("backbone")(images)[stage]
    scores = policy.net(features)[:, 0]
    assert torch.equal(chosen, policy.cut(scores.float()))
    assert relative_error(logits, model(images, chosen)) < 1e-12
    again = model.start(images).follow().mask
    assert again is not None
    assert torch.equal(again, chosen), "deterministic in eval"
    fast = model.for_inference()
    assert relative_error(fast(images), logits) < 1e-12


def test_the_net_is_cheap() -> None:
    mask = {"policy": "learned", "fine_fraction": 0.0}
    for config in ({"head": "deeplabv3"}, {"width": 0.625}):
        model = build_model(config | {"mask": mask}).eval()
        counts = count_macs(model, torch.zeros(1, 3, 64, 96))
        assert 0 < counts["mask"] < 0.02 * sum(counts.values())


def test_straight_through_values_and_gradient() -> None:
    scores = torch.tensor([-30.0, 30.0, 0.5] * 1000, requires_grad=True)
    chosen = straight_through(scores)
    assert set(chosen.tolist()) == {0.0, 1.0}
    assert chosen[0::3].sum() == 0
    assert chosen[1::3].sum() == 1000
    assert chosen[2::3].mean().item() == pytest.approx(torch.tensor(0.5).sigmoid().item(), abs=0.05)
    chosen.sum().backward()
    assert scores.grad is not None
    assert scores.grad[2::3].mean() > 0.05
    assert (scores.grad >= 0).all()


@pytest.mark.parametrize("head", ["lite", "deeplabv3", "deeplabv3plus"])
def test_straight_through_loss_at_the_ends(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All fine it is the dense network's loss and all coarse the selective one's; in between both mix, the
    choice gets a gradient either way, and the budget is (share - fraction) squared."""
    model, (images, labels) = learned_model(head=head), batch((70, 101))
    model.eval()
    loss = SegmentationLoss(LossConfig())
    for share in (0.0, 1.0):
        monkeypatch.setattr(objective, "straight_through", lambda scores, share=share: scores * 0 + share)
        found = straight_through_loss(model.start(images), labels, loss, 4.0)
        expected = model(images, torch.full((2, 5, 7), bool(share))) if head == "lite" or share else None
        if expected is not None:  # image pooling reads the fine features in either case
            expected = F.cross_entropy(expected, labels) + 4 * (share - 0.25) ** 2
            assert found.item() == pytest.approx(expected.item(), rel=1e-9)
        model.zero_grad()
        found.backward()
        assert any(parameter.grad is not None for parameter in model.policy.parameters())
        assert model.module.get_parameter("backbone.conv1.weight").grad is not None


def fit_policy(model: SelectiveNetwork, steps: int, loss: Callable[[], Tensor]) -> None:
    """In training mode, as a Trainer has it: with norms that are frozen, every ReLU of the net may die."""
    model.requires_grad_(False).policy.requires_grad_(True)
    model.policy.train()
    optimizer = torch.optim.Adam(model.policy.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    model.policy.eval()


@pytest.mark.slow
def test_the_budget_is_reached() -> None:
    model, (images, labels) = learned_model(), batch()
    plain = SegmentationLoss(LossConfig())
    fit_policy(model, 40, lambda: straight_through_loss(model.start(images), labels, plain, 30.0))
    with torch.no_grad():
        scores = model.policy.scores(model.start(images))
    assert scores.sigmoid().mean().item() == pytest.approx(0.25, abs=0.1)


def changed_blocks(model: SelectiveNetwork, images: Tensor) -> Tensor:
    """The share of each block's pixels whose class the dense fine network changes."""
    with torch.no_grad():
        fine, coarse = (
            model.dense(images, stride).argmax(1) for stride in (model.strides[0], model.strides[-1])
        )
    return block_mean((fine != coarse).float(), model.strides[-1])


@pytest.mark.slow
@pytest.mark.parametrize("strides", [[8, 16], [8, 16, 32], [4, 8, 16]], ids=str)
def test_supervised_loss(strides: list[int]) -> None:
    model, (images, _) = learned_model(strides=strides), batch()
    target = changed_blocks(model, images)
    assert 0 < target.mean() < 1
    expected = F.binary_cross_entropy(model.policy.scores(model.start(images)).sigmoid(), target)
    assert supervised_loss(model.start(images)).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
def test_what_supervised_masks_look_for_is_learnable() -> None:
    model, (images, _) = learned_model(), batch()
    fit_policy(model, 60, lambda: supervised_loss(model.start(images)))
    with torch.no_grad():
        learned = model.policy.scores(model.start(images)).flatten()
    ranks = torch.stack((learned, changed_blocks(model, images).flatten())).argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.7
