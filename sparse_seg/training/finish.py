"""Trainings as steps of something larger: run to their end, whatever is there already."""

from __future__ import annotations

from pathlib import Path

import torch

from sparse_seg.config import Config
from sparse_seg.errors import TrainingError
from sparse_seg.training.checkpoint import checkpoint_config, load_checkpoint
from sparse_seg.training.stopping import is_complete
from sparse_seg.training.trainer import Trainer


def finish_training(config: Config, work_dir: str | Path, device: torch.device | str = "cpu") -> Path:
    """Train in `work_dir`, go on with the run that is there, or leave a finished one; returns `best.pt`.

    Raises:
        TrainingError: the folder holds a run of another config.
    """
    work_dir = Path(work_dir)
    if not is_finished(config, work_dir):
        trainer = Trainer(config, work_dir, resume=(work_dir / "last.pt").exists(), device=device)
        trainer.how_to_go_on = "run it again to go on"  # by this function
        trainer.how_to_go_on_changed = f"remove {work_dir} and run it again"
        trainer.run()
    return work_dir / "best.pt"


def is_finished(config: Config, work_dir: Path) -> bool:
    """Whether a folder holds a run of this config that has come to its end.

    Raises:
        TrainingError: the folder holds a run of another config.
    """
    last = work_dir / "last.pt"
    if not last.exists():
        return False
    state = load_checkpoint(last)
    if checkpoint_config(state, last) != config:
        raise TrainingError(f"{work_dir} holds a run of another config; remove it or choose another folder")
    return is_complete(state, config.train.iterations, work_dir)
