"""A few synthetic scenes and a small network with random statistics."""

from pathlib import Path

import pytest
import torch

from sparse_seg import build_model
from sparse_seg.data import build_dataset
from sparse_seg.data.scenes import write_scenes


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    root: Path = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, 10, (64, 96), val_fraction=0.4)
    return build_dataset("scenes", root, "val")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(
        {"backbone": "resnet18", "width": 0.125, "head_channels": 16, "num_classes": 19}
    ).eval()
