"""Policy `gain`, whose net finds the blocks which profit; thresholds that spend a budget over a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sparse_seg import build_model, load_model
from sparse_seg.checkpoint import load
from sparse_seg.checkpoint.captured import content_of
from sparse_seg.cli import fit_gain, main
from sparse_seg.config import DataConfig, load_config
from sparse_seg.data import build_dataset
from sparse_seg.data.dataset import SegmentationDataset
from sparse_seg.data.transforms import normalise
from sparse_seg.errors import ConfigError
from sparse_seg.evaluation.calibrate import _cut, calibrate
from sparse_seg.evaluation.evaluate import evaluate
from sparse_seg.masks.gain import GainPolicy
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.training.checkpoint import save_checkpoint
from sparse_seg.training.gain import Sample, clusters, collect, fit
from tests.reference import randomise, relative_error


@pytest.mark.parametrize("size", [(24, 32), (23, 30)], ids=str)
def test_it_reads_means_and_the_largest_entropy_of_each_block(size: tuple[int, int]) -> None:
    """Against sums written out, cut blocks included."""
    logits = 3 * torch.randn(2, 5, *size)
    found = GainPolicy(fine_fraction=0.1, net=torch.nn.Identity()).read(logits)
    p = logits.double().softmax(1)
    values = torch.cat([p, -(p * p.log()).sum(1, keepdim=True)], 1)
    for y in range(found.shape[2]):
        for x in range(found.shape[3]):
            block = values[:, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].flatten(2)
            assert relative_error(found[:, :-1, y, x], block.mean(2)) < 1e-5
            assert relative_error(found[:, -1, y, x], block[:, -1].amax(1)) < 1e-5


@pytest.mark.slow
def test_the_net_learns_which_blocks_gain() -> None:
    """Gains planted in one of the probabilities; blocks that were not fine teach nothing."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(60):
        read = torch.rand(7, 6, 8, generator=generator)
        fine = clusters((6, 8), 0.4, generator)[0]
        gain = 0.2 * (F.avg_pool2d(read[None, 2:3], 3, 1, 1)[0, 0] - 0.4)
        samples.append(Sample(read, torch.where(fine, gain, torch.full_like(gain, 9.0)), fine))
    net = fit(samples, epochs=40)
    reads = torch.rand(20, 7, 6, 8, generator=generator)
    expected = 0.2 * (F.avg_pool2d(reads[:, 2:3], 3, 1, 1) - 0.4)
    with torch.no_grad():
        found = net(reads)
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.9
    assert abs((found - expected).mean()) < 0.02  # a score is a gain


def test_from_frames_to_a_checkpoint(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By command; the file alone then runs with the policy, and the network in it is unchanged. With another
    epsilon of batch norm than PyTorch's, as networks converted from TensorFlow have, the net that runs is
    the net that was fitted."""
    config = load_config(tiny, ["model.bn_eps=0.01"])
    network, out = tmp_path / "network.safetensors", tmp_path / "gain.safetensors"
    save_checkpoint(network, config, *content_of(build_model(config)))
    fitted = []

    def kept(*arguments: Any, **options: Any) -> torch.nn.Sequential:
        fitted.append(fit(*arguments, **options))
        return fitted[-1]

    monkeypatch.setattr(fit_gain, "fit", kept)
    command = ["fit_gain", str(tiny), str(network), str(out), "--limit", "2", "--set", "model.bn_eps=0.01"]
    for options in (["--without-labels", "--seed", "1"], []):
        assert main([*command, *options]) == 0
    before, after = load(network), load(out)
    assert (after.config.mask.policy, after.config.merge) == ("gain", "patch")
    assert all(torch.equal(tensor, after.weights[name]) for name, tensor in before.weights.items())
    model: Any = load_model(out)
    run = model.start(torch.randn(1, 3, 64, 96)).follow()
    assert run.mask.sum() == round(after.config.mask.fine_fraction * 24)
    assert run.macs()["mask"] == 24 * sum(p.numel() for p in model.policy.parameters() if p.ndim == 4)
    reads = torch.rand(1, 21, 4, 6)
    with torch.no_grad():
        assert torch.equal(model.policy.net(reads), fitted[-1](reads))
        assert not torch.equal(fitted[0](reads), fitted[-1](reads))


def test_collected_gains(scenes: Path) -> None:
    """Against the classes of a pass with and without a mask, block by block."""
    torch.manual_seed(0)
    model = build_model({"backbone": "resnet18", "width": 0.125, "num_classes": 19})
    randomise(model)
    dataset, data = build_dataset("scenes", scenes, "train"), DataConfig()
    samples = collect(model, dataset, data, limit=1)
    assert len(samples) == 2
    image, label = dataset.load(0)
    images, truth = normalise(image, data.mean, data.std)[None], torch.from_numpy(label).long()[None]
    with torch.inference_mode():
        coarse = model.start(images).follow(Way.dense(16)).classes()
        fine = model.start(images).take(samples[0].fine[None], Way(merge="patch")).classes()
    change = (fine == truth).float() - (coarse == truth).float()
    change = (change * (truth != 255)).view(4, 16, 6, 16).mean((1, 3))
    assert relative_error(samples[0].gain, change) < 1e-6
    assert change.abs().max() > 0


DATA = DataConfig()


@pytest.fixture
def dataset(scenes: Path) -> SegmentationDataset:
    return build_dataset("scenes", scenes, "train")


def network(**mask: object) -> SelectiveNetwork:
    torch.manual_seed(0)
    strides = [8, 16, 32] if "middle_fraction" in mask or "middle_threshold" in mask else [8, 16]
    settings: dict[str, Any] = {"width": 0.125, "head_channels": 16, "num_classes": 19, "strides": strides}
    model = build_model(settings | {"mask": {"policy": "edge"} | mask})
    randomise(model)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("mask", [{"blur": True}, {"policy": "confidence"}], ids=str)
def test_the_threshold_spends_the_budget(dataset: SegmentationDataset, mask: dict) -> None:
    """Run with it, the frames together have the share, and differ among themselves."""
    found = calibrate(network(fine_fraction=0.3, **mask), dataset, DATA)
    result = evaluate(network(threshold=found.threshold, **mask), dataset, DATA)
    assert result.fine_fraction == pytest.approx(0.3, abs=0.5 / (len(dataset) * 24))
    assert result.fine_fraction == pytest.approx(sum(found.shares) / len(found.shares))
    assert max(found.shares) > min(found.shares)
    assert len(found.shares) == len(dataset)


def test_three_strides(dataset: SegmentationDataset) -> None:
    found = calibrate(network(fine_fraction=1 / 3, middle_fraction=1 / 3), dataset, DATA, limit=3)
    assert found.middle_threshold is not None
    assert found.middle_threshold < found.threshold
    model = network(threshold=found.threshold, middle_threshold=found.middle_threshold)
    counts = torch.zeros(3)
    for index in range(3):
        image, _ = dataset.load(index)
        images = normalise(image, DATA.mean, DATA.std)[None]
        counts += torch.bincount(model.start(images).follow().levels.flatten(), minlength=3)
    assert (counts / counts.sum()).tolist() == pytest.approx([1 / 3] * 3)


def test_cuts() -> None:
    ranked = torch.tensor([4.0, 3.0, 2.0, 1.0])
    for share, fine in ((0, 0), (0.25, 1), (0.5, 2), (1, 4)):
        assert (ranked > _cut(ranked, share)).sum() == fine
    ranked = torch.tensor([1.0] * 50 + [0.0] * 50)
    assert _cut(ranked, 0.5) == 0.5
    with pytest.raises(ConfigError, match=r"a share of 0.2 of the blocks fine: too many scores are 1;"):
        _cut(ranked, 0.2)
    ties = torch.tensor([1.0] * 21 + [0.5] * 79)  # a share of 0.2 lies within the first
    assert _cut(ties, 0.2) == 0.75
