"""Policy `gain`: what it reads, and a net that finds the blocks which profit."""

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
from sparse_seg.data.transforms import normalise
from sparse_seg.masks.gain import GainPolicy
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
