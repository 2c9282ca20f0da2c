"""Training log: one JSON line per log step and validation, and TensorBoard if asked."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_seg.errors import import_package
from sparse_seg.files import atomic_write

_LOG = logging.getLogger(__name__)


class TrainingLog:
    """`log.jsonl` in a work folder, truncated to the iteration that is resumed.

    Lines that a kill or a full disk cut are left out, with a warning. `seconds` of a line are those of
    training so far, over all runs.

    Args:
        work_dir: exists.
        iteration: where the run starts.
        tensorboard: whether values also go to `tensorboard/`.

    Raises:
        SparseSegError: TensorBoard is asked for, and missing or broken.
    """

    def __init__(self, work_dir: Path, iteration: int, tensorboard: bool = False) -> None:
        self.path = work_dir / "log.jsonl"
        text = self.path.read_bytes().decode(errors="replace") if self.path.exists() else ""
        lines = [(line, _content(line)) for line in text.splitlines(keepends=True) if line.strip()]
        damaged = sum(found is None for _, found in lines)
        if damaged:
            _LOG.warning("warning: %s: %d damaged lines are left out", self.path, damaged)
        kept = [(line, found) for line, found in lines if found and found["iteration"] <= iteration]
        atomic_write(self.path, "".join(line for line, _ in kept))
        before = kept[-1][1].get("seconds") if kept else 0
        self.started = time.monotonic() - (before if isinstance(before, int | float) else 0)
        self.tensorboard = _tensorboard_writer(work_dir, iteration) if tensorboard else None

    def write(self, iteration: int, **values: float | Mapping[str, float]) -> None:
        """Add a line of numbers, or of numbers by name; those that are nan become null."""
        known = {name: _known(value) for name, value in values.items()}
        elapsed = {"iteration": iteration, "seconds": round(time.monotonic() - self.started, 1)}
        with self.path.open("a") as file:
            file.write(json.dumps(elapsed | known) + "\n")
        if self.tensorboard is not None:
            for name, value in known.items():
                parts = value if isinstance(value, dict) else {"": value}
                for part, number in parts.items():
                    if number is not None:
                        self.tensorboard.add_scalar(f"{name}/{part}".rstrip("/"), number, iteration)
            self.tensorboard.flush()


def _known(value: float | Mapping[str, float]) -> Any:
    if isinstance(value, Mapping):
        return {name: _known(one) for name, one in value.items()}
    return None if math.isnan(value) else value


def _content(line: str) -> dict[str, Any] | None:
    """A whole line of the log."""
    try:
        content = json.loads(line)
        found = content["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return content if type(found) is int and line.endswith("\n") else None


def _tensorboard_writer(work_dir: Path, iteration: int) -> Any:
    missing = "train.tensorboard needs: pip install 'sparse_seg[tensorboard]'"
    import_package("tensorboard.summary.writer.event_file_writer", missing)
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(work_dir / "tensorboard"), purge_step=iteration)
