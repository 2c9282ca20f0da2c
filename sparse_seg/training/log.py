"""What a run tells of itself: a line of JSON per log step and validation, and TensorBoard if asked."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from sparse_seg.errors import TrainingError
from sparse_seg.files import atomic_write


class TrainingLog:
    """`log.jsonl` in a work folder, without lines later than the iteration that is gone on from.

    Args:
        work_dir: exists.
        iteration: where the run starts.
        tensorboard: whether values also go to `tensorboard/`.

    Raises:
        TrainingError: TensorBoard is asked for and missing.
    """

    def __init__(self, work_dir: Path, iteration: int, tensorboard: bool = False) -> None:
        self.path, self.started = work_dir / "log.jsonl", time.monotonic()
        lines = self.path.read_text(errors="replace").splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in lines if _iteration(line) <= iteration]
        atomic_write(self.path, "".join(kept))
        self.tensorboard = _tensorboard_writer(work_dir, iteration) if tensorboard else None

    def write(self, iteration: int, **values: float) -> None:
        """Add a line; values that are not a number become null."""
        known = {name: None if math.isnan(value) else value for name, value in values.items()}
        elapsed = {"iteration": iteration, "seconds": round(time.monotonic() - self.started, 1)}
        with self.path.open("a") as file:
            file.write(json.dumps(elapsed | known) + "\n")
        if self.tensorboard is not None:
            for name, value in known.items():
                if value is not None:
                    self.tensorboard.add_scalar(name, value, iteration)
            self.tensorboard.flush()


def _iteration(line: str) -> float:
    """A line's iteration; infinity for one that a crash cut off or left blank."""
    try:
        return float(json.loads(line)["iteration"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _tensorboard_writer(work_dir: Path, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError("train.tensorboard needs: pip install 'sparse_seg[tensorboard]'") from None
    return SummaryWriter(str(work_dir / "tensorboard"), purge_step=iteration)
