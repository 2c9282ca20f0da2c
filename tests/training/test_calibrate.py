"""A budget over a data set: thresholds that give all blocks together a share, frames their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_seg import build_model
from sparse_seg.config import DataConfig
from sparse_seg.data import build_dataset
from sparse_seg.data.dataset import SegmentationDataset
from sparse_seg.data.transforms import normalise
from sparse_seg.errors import ConfigError
from sparse_seg.evaluation.calibrate import _cut, calibrate
from sparse_seg.evaluation.evaluate import evaluate
from sparse_seg.run.network import SelectiveNetwork
from tests.reference import randomise

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
