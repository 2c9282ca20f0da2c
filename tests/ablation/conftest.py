"""A tiny grid on synthetic scenes, run once for all tests that read its results."""

from pathlib import Path

import pytest

from sparse_seg.cli import main
from sparse_seg.data.scenes import write_scenes
from sparse_seg.lab.ablation import costs

GRID = """
title: Tiny
description: Nothing is learned here.
seeds: [1]
networks:
  baseline: {config: tiny.yaml}
  student: {config: tiny.yaml, set: [model.width=0.0625]}
  taught:
    config: tiny.yaml
    teacher: baseline
    set: [model.width=0.0625, train.loss.boundary_weight=1, train.loss.coarse_weight=0.4]
  student again: {source: student, statistics: selective}
  tuned: {config: tiny.yaml, init: student, set: [model.width=0.0625, train.iterations=1, train.lr=0.000001]}
runs:
  - {networks: [baseline], dense: [8, 16], policies: [random], fractions: [0, 1]}
  - {networks: [student, taught], policies: [edge], fractions: [0.25], exchange: [none, linear]}
  - {networks: [student again, tuned], policies: [confidence], fractions: [0.25]}
  - {networks: [student], policies: [edge], fractions: [0.25], strides: [8, 16, 32], middle_fraction: 0.5}
"""


@pytest.fixture(scope="session")
def grid_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    write_scenes(folder / "scenes", 10, (64, 96), val_fraction=0.2)
    (folder / "tiny.yaml").write_text(
        f"""
model: {{width: 0.125, depths: [1, 1, 1, 1], head_channels: 16, mask: {{policy: edge}}}}
data: {{root: {folder / "scenes"}, crop: [64, 64]}}
train: {{iterations: 2, batch_size: 2, threads: 1}}
"""
    )
    (folder / "grid.yaml").write_text(GRID)
    return folder / "grid.yaml"


@pytest.fixture(scope="session")
def finished(grid_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a finished ablation; memory is measured in tests/evaluation/test_cost.py."""
    work_dir = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "peak_memory", lambda prepare, arguments, *given: prepare(*arguments) and 12.0)
        assert main(["ablate", str(grid_file), "--work-dir", str(work_dir), "--device", "cpu"]) == 0
    return work_dir
