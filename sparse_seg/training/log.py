"""Training log: one JSON line per log step and validation, and TensorBoard if asked."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from sparse_seg.errors import TrainingError
from sparse_seg.files import atomic_write

_LOG = logging.getLogger(__name__)


class TrainingLog:
    """`log.jsonl` in a work folder, truncated to the iteration that is resumed.

    Lines that a kill or a full disk cut are left out, with a warning.

    Args:
        work_dir: exists.
        iteration: where the run starts.
        tensorboard: whether values also go to `tensorboard/`.

    Raises:
        TrainingError: TensorBoard is asked for and missing.
    """

    def __init__(self, work_dir: Path, iteration: int, tensorboard: bool = False) -> None:
        self.path, self.started = work_dir / "log.jsonl", time.monotonic()
        text = self.path.read_bytes().decode(errors="replace") if self.path.exists() else ""
        lines = [(line, _iteration(line)) for line in text.splitlines(keepends=True) if line.strip()]
        damaged = sum(found is None for _, found in lines)
        if damaged:
            _LOG.warning("warning: %s: %d damaged lines are left out", self.path, damaged)
        kept = [line for line, found in lines if found is not None and found <= iteration]
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


def _iteration(line: str) -> int | None:
    """The iteration of a whole line of the log."""
    try:
        found = json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if type(found) is int and line.endswith("\n") else None


def _tensorboard_writer(work_dir: Path, iteration: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError("train.tensorboard needs: pip install 'sparse_seg[tensorboard]'") from None
    return SummaryWriter(str(work_dir / "tensorboard"), purge_step=iteration)
