"""Distillation: its two losses against plain loops, the teacher's cache, and teachers that do not fit."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_seg.checkpoint.captured import content_of
from sparse_seg.config import Config, load_config
from sparse_seg.errors import CheckpointError, ConfigError
from sparse_seg.run.build import build_model
from sparse_seg.run.exits import last_exit
from sparse_seg.run.way import Way
from sparse_seg.training import distillation
from sparse_seg.training.checkpoint import save_checkpoint
from sparse_seg.training.distillation import Teacher, TeacherOutputs, likeness_difference, logits_divergence
from tests.reference import randomise


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_divergence_is_kullback_leiblers() -> None:
    student, teacher = values(2, 4, 3, 5), 3 * values(2, 4, 3, 5, seed=1)
    weights = values(2, 3, 5, seed=2).abs()
    p = np.exp(teacher.numpy() / 2.5)
    p /= p.sum(1, keepdims=True)
    q = np.exp(student.numpy() / 2.5)
    q /= q.sum(1, keepdims=True)
    cells = (p * np.log(p / q)).sum(1)
    expected = 2.5**2 * (cells * weights.numpy()).sum() / weights.numpy().sum()
    assert logits_divergence(student, teacher, weights, 2.5).item() == pytest.approx(expected, rel=1e-5)
    assert logits_divergence(teacher, teacher, weights, 2.5).item() == pytest.approx(0, abs=1e-6)


def test_likeness_is_compared_pair_by_pair() -> None:
    student, grid = values(2, 6, 5, 7), values(2, 9, 5, 7, seed=1)
    weights, is_site = values(2, 5, 7, seed=2).abs(), values(2, 5, 7, seed=3) > 0
    total = weight = 0.0
    for image in range(2):
        for (y, x), (v, u) in itertools.product(is_site[image].nonzero().tolist(), repeat=2):
            pair = (weights[image, y, x] * weights[image, v, u]).item()
            own = torch.cosine_similarity(student[image, :, y, x], student[image, :, v, u], 0)
            theirs = torch.cosine_similarity(grid[image, :, y, x], grid[image, :, v, u], 0)
            total += pair * (own - theirs).item() ** 2
            weight += pair
    found = likeness_difference(student, grid, is_site, weights).item()
    assert found == pytest.approx(total / weight, rel=1e-5)


def test_likeness_of_many_sites_takes_some_of_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    student, grid = values(2, 6, 5, 7), values(2, 9, 5, 7, seed=1)
    every = torch.ones(2, 5, 7, dtype=torch.bool)
    monkeypatch.setattr(distillation, "MOST_SITES", 12)
    some = likeness_difference(student, grid, every, torch.ones(2, 5, 7))
    few = torch.zeros(2, 35)
    few[:, ::3] = 1  # 12 of 35
    monkeypatch.setattr(distillation, "MOST_SITES", 1000)
    torch.testing.assert_close(likeness_difference(student, grid, every, few.view(2, 5, 7)), some)


@pytest.mark.parametrize("strides", [[8, 16], [8, 16, 32], [4, 8, 16]], ids=str)
@torch.no_grad()
def test_sites_are_those_of_the_mask(strides: list[int]) -> None:
    """A cell of the last exit is a site where its block's stride divides its place; of a dense pass, all."""
    model = build_model({"width": 0.125, "strides": strides}).eval()
    images = values(2, 3, 70, 101).float()
    sizes = [-(-length // strides[-1]) for length in (70, 101)]
    levels = torch.randint(0, len(strides), (2, *sizes), generator=torch.Generator().manual_seed(0))
    grid, found = last_exit(model.start(images).take(levels))
    cells, step = [-(-length // strides[0]) for length in (70, 101)], strides[-1] // strides[0]
    spacing = torch.tensor(strides[::-1])[levels].repeat_interleave(step, 1).repeat_interleave(step, 2)
    spacing = spacing[:, : cells[0], : cells[1]]
    y, x = (strides[0] * torch.arange(count) for count in cells)
    assert torch.equal(found, (y[:, None] % spacing == 0) & (x % spacing == 0))
    assert grid.stride == strides[0]
    dense, every = last_exit(model.start(images).follow(Way.dense(strides[0])))
    assert every.all()
    assert dense.tensor.shape == grid.tensor.shape
    coarse = last_exit(model.start(images).take(levels * 0))[0].tensor[:, :, ::step, ::step]
    torch.testing.assert_close(grid.tensor[:, :, ::step, ::step], coarse)  # P1


@pytest.fixture
def teacher(tiny: Path, tmp_path: Path) -> tuple[Config, Path]:
    """A student's config and a teacher with random weights and statistics, wider than the student."""
    config = load_config(tiny, ["model.width=0.25", "model.auxiliary=false"])
    model = build_model(config)
    randomise(model)
    path = tmp_path / "teacher.pt"
    save_checkpoint(path, config, *content_of(model))
    return load_config(tiny, ["model.auxiliary=false"]), path


def test_teacher_of_another_normalisation_sees_the_same_pictures(
    teacher: tuple[Config, Path], tiny: Path
) -> None:
    config, path = teacher
    other = load_config(
        tiny, ["model.auxiliary=false", "data.mean=[0.5, 0.4, 0.3]", "data.std=[0.5, 0.2, 0.1]"]
    )
    pictures = values(2, 3, 64, 80).float().sigmoid()
    seen = [
        (pictures - torch.tensor(one.data.mean)[:, None, None]) / torch.tensor(one.data.std)[:, None, None]
        for one in (config, other)
    ]
    expected, found = Teacher(path, config)(seen[0], 8, 8), Teacher(path, other)(seen[1], 8, 8)
    assert (seen[0] - seen[1]).abs().max() > 0.1
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0.02)  # both are float16


def test_teacher_of_other_strides_is_read_in_the_middle_of_the_cells(tiny: Path, tmp_path: Path) -> None:
    """Of 8x8 px that is pixel 4: of a grid at 16 px, whose first upsampling was trained at 8, a place of
    `((8 i + 4 + 1/2) / 8 - 1/2) / 2` cells."""
    config = load_config(tiny, ["model.auxiliary=false", "model.strides=[16, 32]", "train.output_stride=16"])
    model = build_model(config)
    randomise(model)
    save_checkpoint(tmp_path / "teacher.pt", config, *content_of(model))
    images = values(2, 3, 64, 96).float()
    teacher = Teacher(tmp_path / "teacher.pt", load_config(tiny, ["model.auxiliary=false"]))
    found, expected = teacher(images, 8, 8).logits, teacher(images, 16, 16).logits
    for axis, count in ((2, 8), (3, 12)):
        places = ((8 * torch.arange(count) + 4.5) / 8 - 0.5) / 2
        low = places.long()
        high = (low + 1).clamp_max(expected.shape[axis] - 1)
        share = (places - low).view(-1, *[1] * (3 - axis))
        expected = expected.index_select(axis, low) * (1 - share) + expected.index_select(axis, high) * share
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3 * expected.abs().max().item())  # float16


def test_cache_changes_no_value_and_saves_the_run(
    teacher: tuple[Config, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = teacher
    images = values(3, 3, 64, 80).float()
    kept, plain = Teacher(path, config, tmp_path / "cache"), Teacher(path, config)
    # one image at a time, so that both run the very same sizes
    first = [kept(image[None], 8, 8) for image in images[:2]]
    for image, outputs in zip(images, first, strict=False):
        assert all(map(torch.equal, outputs, plain(image[None], 8, 8)))
        grid = plain.model.start(image[None]).follow(Way.dense(8)).grid_logits()
        torch.testing.assert_close(outputs.logits, grid.half().float())
        assert outputs.features.shape == (1, 16, 8, 10)
        assert not outputs.logits.requires_grad
    ran: list[int] = []
    run = kept._run

    def counted(new: Tensor, *strides: int) -> TeacherOutputs:
        ran.append(len(new))
        return run(new, *strides)

    monkeypatch.setattr(kept, "_run", counted)
    second = kept(images, 8, 8)
    assert ran == [1], "two of three images were kept"
    assert torch.equal(second.logits[:2], torch.cat([outputs.logits for outputs in first]))
    kept(images, 16, 16)
    assert ran == [1, 3], "another output stride is another file"
    with torch.autocast("cpu", torch.bfloat16):
        mixed = [kept(images, 8, 8) for _ in range(2)]
    assert ran == [1, 3, 3], "another precision, too"
    assert all(map(torch.equal, *mixed))
    for file in (tmp_path / "cache").rglob("*.pt"):
        file.write_bytes(file.read_bytes()[:50])
    assert all(map(torch.equal, kept(images[:1], 8, 8), first[0])), "a damaged file is made again"


@pytest.mark.parametrize(
    ("override", "message"),
    [("model.num_classes=7", "classes 19"), ("model.trained_stride=16", "model.trained_stride 8")],
)
def test_teachers_that_do_not_fit(
    teacher: tuple[Config, Path], tiny: Path, override: str, message: str
) -> None:
    config = load_config(tiny, ["model.auxiliary=false", override])
    with pytest.raises(ConfigError, match=message):
        Teacher(teacher[1], config)
    with pytest.raises(CheckpointError, match="does not exist"):
        Teacher("nowhere.pt", config)
