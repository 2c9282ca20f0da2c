"""What is added against the loss of light networks: each part alone, all together, dense and selective."""

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.checkpoint.captured import content_of
from sparse_seg.config import DistillConfig, LossConfig, TrainConfig, load_config
from sparse_seg.masks import label_boundary
from sparse_seg.run.build import build_model
from sparse_seg.run.exits import lattice_logits
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.training.checkpoint import save_checkpoint
from sparse_seg.training.distillation import Teacher
from sparse_seg.training.losses import near_boundary
from sparse_seg.training.objective import Objective
from sparse_seg.training.statistics import recalibrate_batch_norm
from tests.reference import random_model, randomise, relative_error


def batch(size: tuple[int, int] = (70, 101), classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, classes, (2, size[0] // 10 + 1, size[1] // 10 + 1), generator=generator)
    labels = labels.repeat_interleave(10, 1).repeat_interleave(10, 2)[:, : size[0], : size[1]]
    labels[:, :7] = 255
    return images, labels


@pytest.mark.parametrize("width", [1, 2, 4])
def test_near_boundary_is_its_definition(width: int) -> None:
    """OpenCV's dilation of the boundaries, which tests/masks compares with loops over pixels."""
    labels, square = batch((41, 53))[1], np.ones((2 * width - 1, 2 * width - 1), np.uint8)
    boundary = label_boundary(labels).numpy().astype(np.uint8)
    expected = np.stack([cv2.dilate(one, square) for one in boundary])
    assert near_boundary(labels, width).tolist() == (expected > 0).tolist()
    assert 0 < expected.sum() < expected.size


@pytest.mark.parametrize("network", ["dense", "selective"])
def test_the_coarse_lattice_learns_from_the_network_that_runs(network: str) -> None:
    """Its divergence from that prediction, whose gradient it does not get; unlabelled pixels do not count."""
    model, (images, labels) = student(), batch()

    def gradients(weight: float) -> tuple[Tensor, list[Tensor]]:
        train = TrainConfig(network=network, loss=LossConfig(coarse_distill_weight=weight))
        loss = Objective(train)(model, images, labels)
        return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    model.eval()
    run = model.start(images)
    run = run.follow(Way.dense(8)) if network == "dense" else run.take(model.policy(run))
    coarse, logits = lattice_logits(run).log_softmax(1), run.logits().detach().log_softmax(1)
    known = labels != 255
    expected = 0.7 * (logits.exp() * (logits - coarse)).sum(1)[known].mean()
    plain, taught = gradients(0.0), gradients(0.7)
    assert (taught[0] - plain[0]).item() == pytest.approx(expected.item(), rel=1e-5)
    own = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for before, after, added in zip(plain[1], taught[1], own, strict=True):
        if before is not None:
            difference = 0 if added is None else added
            torch.testing.assert_close(after - before, difference + 0 * before, rtol=1e-3, atol=1e-6)
    assert Objective(TrainConfig(loss=LossConfig(coarse_distill_weight=1)))(
        model, images, torch.full_like(labels, 255)
    ).isfinite()


@pytest.mark.parametrize("strides", [(8, 16), (8, 16, 32), (4, 8, 16)], ids=str)
@torch.no_grad()
def test_coarse_logits_are_those_of_an_all_coarse_mask(strides: tuple[int, ...]) -> None:
    """By P1 they do not depend on the mask that the rows were made with, nor does a dense run's."""
    model = random_model("resnet18", "lite", dtype=torch.float64, strides=strides)
    images = batch()[0]
    shape = (2, *(-(-length // strides[-1]) for length in images.shape[2:]))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.3
    for run in (model.start(images).take(mask), model.start(images).follow(Way.dense(strides[0]))):
        assert relative_error(lattice_logits(run), model(images, torch.zeros_like(mask))) < 1e-12


def student(**mask: object) -> SelectiveNetwork:
    torch.manual_seed(0)
    settings = {"width": 0.125, "num_classes": 5, "head_channels": 16}
    model = build_model(settings | {"mask": {"policy": "edge", "fine_fraction": 0.3} | mask})
    randomise(model)
    return model.double()


@pytest.mark.slow
@pytest.mark.parametrize(("network", "policy"), [("dense", "confidence"), ("selective", "edge")])
def test_parts_add_up(network: str, policy: str, tmp_path: Path, tiny: Path) -> None:
    model, (images, labels) = student(policy=policy), batch()
    config = load_config(tiny, ["model.auxiliary=false", "model.num_classes=5", "data.dataset=scenes"])
    teacher_model = build_model(config)
    randomise(teacher_model, 5)
    save_checkpoint(tmp_path / "teacher.pt", config, *content_of(teacher_model))
    teacher = Teacher(tmp_path / "teacher.pt", config)
    teacher.model.double()

    def loss(taught: bool = False, logits: float = 0.0, features: float = 0.0, **weights: Any) -> float:
        distill = DistillConfig(logits_weight=logits, features_weight=features)
        train = TrainConfig(network=network, loss=LossConfig(**weights), distill=distill)
        return Objective(train, teacher if taught else None)(model, images, labels).item()

    plain = loss()
    logits = model.dense(images) if network == "dense" else model.start(images).follow().logits()
    assert plain == pytest.approx(F.cross_entropy(logits, labels, ignore_index=255).item(), rel=1e-9)
    parts = [
        loss(coarse_weight=0.4) - plain,
        loss(taught=True, logits=0.7) - plain,
        loss(taught=True, features=1.3) - plain,
    ]
    assert min(parts) > 0
    assert loss(taught=True) == pytest.approx(plain, rel=1e-9)
    together = loss(taught=True, logits=0.7, features=1.3, coarse_weight=0.4)
    assert together == pytest.approx(plain + sum(parts), rel=1e-6)  # distillation runs in float32
    stressed = loss(boundary_weight=1.0, fine_weight=0.5)
    assert stressed != pytest.approx(plain, rel=1e-6)


def test_every_weight_gets_gradients_and_the_mask_pass_leaves_training_mode() -> None:
    model, (images, labels) = student(policy="confidence"), batch()
    model.train()
    weights = LossConfig(boundary_weight=1.0, fine_weight=0.5, coarse_weight=0.4)
    Objective(TrainConfig(network="dense", loss=weights))(model, images, labels).backward()
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_statistics_are_the_means_over_batches(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rows that a selective pass gives a norm. Dense ones: test_modules.py."""
    config = load_config(tiny, ["model.mask.policy=confidence", "model.mask.fine_fraction=0.3"])
    torch.manual_seed(0)
    model = build_model(config)
    randomise(model)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    seen: list[Tensor] = []
    norm = model.module.backbone.get_submodule("layer4.0.bn2")
    batch_norm = F.batch_norm

    def note(value: Tensor, mean: Tensor, *others: Any) -> Tensor:
        if mean is norm.running_mean and others[3]:  # in training mode
            seen.append(value)
        return batch_norm(value, mean, *others)

    monkeypatch.setattr(F, "batch_norm", note)
    recalibrate_batch_norm(model, config, "selective", batches=3)
    assert [len(rows) for rows in seen] == [round(2 * 16 * (1 + 3 * round(0.3 * 16) / 16))] * 3
    torch.testing.assert_close(norm.running_mean, torch.stack([rows.mean(0) for rows in seen]).mean(0))
    assert norm.num_batches_tracked == 3
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("strides", [(8, 16), (8, 16, 32)], ids=str)
def test_mixed_precision(strides: tuple[int, ...], device: str) -> None:
    """The coarse lattice's loss, too: on CUDA, what densify interpolates is float32, and its rows are not."""
    model = copy.deepcopy(random_model("resnet18", "lite", strides=strides)).to(device)
    images, labels = (tensor.to(device) for tensor in batch())
    config = TrainConfig(loss=LossConfig(coarse_weight=0.5))
    objective = Objective(config).to(device)
    expected = objective(model, images.float(), labels)
    with torch.autocast(device, torch.bfloat16):
        loss = objective(model, images.float(), labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
