"""Run a training to completion, resuming or skipping it if the folder already holds one."""

from __future__ import annotations

from pathlib import Path

import torch

from sparse_seg.config import Config
from sparse_seg.errors import TrainingError
from sparse_seg.processes import Processes
from sparse_seg.training.checkpoint import LAST, best_of, is_complete, load_state
from sparse_seg.training.trainer import Trainer


def is_finished(config: Config, work_dir: Path) -> bool:
    """Whether a folder holds a finished run of this config.

    Raises:
        TrainingError: the folder holds a run of another config.
        CheckpointError: the run that is there is damaged.
    """
    last = work_dir / LAST
    if not last.exists():
        return False
    state = load_state(last)
    if state["config"] != config:
        raise TrainingError(f"{work_dir} holds a run of another config; remove it or choose another folder")
    return is_complete(state, config.train.iterations, work_dir)


def finish_training(
    config: Config,
    work_dir: str | Path,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
) -> Path:
    """Train in `work_dir`, resume the run found there, or skip a finished one; returns its best weights.

    Raises:
        TrainingError: the folder holds a run of another config.
        CheckpointError: the run that is there is damaged.
    """
    work_dir = Path(work_dir)
    if not is_finished(config, work_dir):
        trainer = Trainer(config, work_dir, (work_dir / LAST).exists(), device, processes)
        trainer.resume_hint = f"run it again to resume, with another config after removing {work_dir}"
        trainer.run()
    return best_of(work_dir)
