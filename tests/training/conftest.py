"""A tiny run: eight synthetic scenes and the smallest network; nothing writes into what tests share."""

from pathlib import Path

import pytest

from sparse_seg.config import load_config
from sparse_seg.data.scenes import write_scenes
from sparse_seg.training.trainer import Trainer


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, 10, (64, 96), val_fraction=0.2)
    return root


@pytest.fixture(scope="session")
def tiny(scenes, tmp_path_factory) -> Path:
    """Config file of a run of six iterations."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    path.write_text(
        f"""
model: {{width: 0.125, depths: [1, 1, 1, 1], head_channels: 16, auxiliary: true}}
data: {{dataset: scenes, root: {scenes}, crop: [64, 64]}}
train:
  {{iterations: 6, batch_size: 2, lr: 0.01, log_every: 1, eval_every: 3, save_every: 2, ema_decay: 0.9,
    clip_grad_norm: 1.0, threads: 1}}
"""
    )
    return path


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory) -> Path:
    """The folder of that run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    Trainer(load_config(tiny), folder).run()
    return folder
