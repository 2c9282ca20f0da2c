"""What a training tells: to a person a bar on a terminal, elsewhere lines; to a machine JSON lines."""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sparse_seg.config import TrainConfig
from sparse_seg.errors import import_package
from sparse_seg.evaluation.evaluate import Evaluation
from sparse_seg.files import atomic_write
from sparse_seg.progress import say
from sparse_seg.training.checkpoint import LOG

LINE_SECONDS = 10.0  # at least, between two lines: an hour's stay under 40 kB
_LOG = logging.getLogger(__name__)


class TrainingReport:
    """Shows where a training is, and keeps `log.jsonl` in its folder: a line per log step and validation.

    The log is truncated to the iteration that is resumed; lines that a kill or a full disk cut are left out,
    with a warning. `seconds` of a line are those of training so far, over all runs.

    Args:
        work_dir: exists.
        iteration: where the run starts.

    Raises:
        SparseSegError: TensorBoard is asked for, and missing or broken.
    """

    def __init__(self, config: TrainConfig, work_dir: Path, iteration: int, device: torch.device) -> None:
        self.config, self.device, self.path = config, device, work_dir / LOG
        before = self._cut_log(iteration)
        self.tensorboard = _tensorboard_writer(work_dir, iteration) if config.tensorboard else None
        settings: dict[str, Any] = {"total": config.iterations, "initial": iteration, "dynamic_ncols": True}
        self.bar = tqdm(desc="train", unit="step", disable=not sys.stderr.isatty(), **settings)
        now = time.monotonic()
        self.began = now - before  # the first run
        self.started = self.marked = now, iteration  # this run, and what a line tells of
        self.next_line = 0.0

    def step(self, loss: float, best: float) -> None:
        """Count a step on the bar; a best mIoU below 0 is none."""
        numbers = {"loss": f"{loss:.3f}"} | ({"best": f"{best:.4f}"} if best >= 0 else {})
        numbers["images/s"] = self._rate(self.started, int(self.bar.n) + 1)
        self.bar.set_postfix(numbers, refresh=False)
        with suppress(OSError):  # the terminal may be gone
            self.bar.update()

    def loss(self, iteration: int, loss: float, rate: float) -> None:
        """Log a mean loss and the learning rate. Without a bar it is also printed, unless the last line is
        recent and this is not the end."""
        total, now = self.config.iterations, time.monotonic()
        if self.bar.disable and (now >= self.next_line or iteration >= total):
            began, first = self.started
            left = timedelta(seconds=round((now - began) / max(iteration - first, 1) * (total - iteration)))
            say(
                f"{self._place(iteration)}  loss {loss:.4f}  lr {rate:.3g}  "
                f"{self._rate(self.marked, iteration)} images/s  ETA {left}  "
                f"peak {_peak_mib(self.device):.0f} MiB"
            )
            self.marked, self.next_line = (now, iteration), now + LINE_SECONDS
        self.write(iteration, loss=loss, lr=rate)  # last: what cannot be printed is done again on resuming

    def validation(self, iteration: int, result: Evaluation, best: float, names: tuple[str, ...]) -> None:
        """Log and print a validation, whose time counts for no line's speed; names: of the classes."""
        metrics, known = result.metrics, result.metrics.as_dict()
        say(
            f"{self._place(iteration)}  mIoU {metrics.miou:.4f}  boundary mIoU {metrics.boundary_miou:.4f}  "
            f"validation loss {math.nan if result.loss is None else result.loss:.4f}  best mIoU {best:.4f}"
        )
        self.marked = time.monotonic(), iteration
        values = {name: known[name] for name in ("miou", "boundary_miou", "pixel_accuracy")}
        class_iou = dict(zip(names, known["class_iou"], strict=True))
        self.write(iteration, **values, val_loss=result.loss, class_iou=class_iou)

    def write(self, iteration: int, **values: Any) -> None:
        """Add a line to the log: of numbers, or numbers by name; None of what is not known."""
        elapsed = {"iteration": iteration, "seconds": round(time.monotonic() - self.began, 1)}
        with self.path.open("a") as file:
            file.write(json.dumps(elapsed | values) + "\n")
        if self.tensorboard is not None:
            for name, value in values.items():
                parts = value if isinstance(value, dict) else {"": value}
                for part, number in parts.items():
                    if number is not None:
                        self.tensorboard.add_scalar(f"{name}/{part}".rstrip("/"), number, iteration)
            self.tensorboard.flush()

    def close(self) -> None:
        with suppress(OSError):
            self.bar.close()

    def _cut_log(self, iteration: int) -> float:
        """Cut off what comes after an iteration; returns the seconds of training up to there."""
        text = self.path.read_bytes().decode(errors="replace") if self.path.exists() else ""
        lines = [(line, _content(line)) for line in text.splitlines(keepends=True) if line.strip()]
        damaged = sum(found is None for _, found in lines)
        if damaged:
            _LOG.warning("warning: %s: %d damaged lines are left out", self.path, damaged)
        kept = [(line, found) for line, found in lines if found and found["iteration"] <= iteration]
        atomic_write(self.path, "".join(line for line, _ in kept))
        seconds = kept[-1][1].get("seconds") if kept else 0
        return seconds if isinstance(seconds, int | float) else 0

    def _rate(self, since: tuple[float, int], iteration: int) -> str:
        """Images a second since a time and iteration."""
        seconds = max(time.monotonic() - since[0], 1e-9)
        return f"{(iteration - since[1]) * self.config.batch_size / seconds:.1f}"

    def _place(self, iteration: int) -> str:
        total = self.config.iterations
        return f"iteration {iteration:{len(str(total))}} of {total}"


def _content(line: str) -> dict[str, Any] | None:
    """A whole line of the log."""
    try:
        content = json.loads(line)
        found = content["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return content if type(found) is int and line.endswith("\n") else None


def _peak_mib(device: torch.device) -> float:
    """The most memory that was in use: the GPU's, or that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _tensorboard_writer(work_dir: Path, iteration: int) -> Any:
    missing = "train.tensorboard needs: pip install 'sparse_seg[tensorboard]'"
    import_package("tensorboard.summary.writer.event_file_writer", missing)
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(work_dir / "tensorboard"), purge_step=iteration)
