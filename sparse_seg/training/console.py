"""What a person sees of a training: a bar on a terminal, elsewhere a line every log step."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from tqdm import tqdm

from sparse_seg.config import TrainConfig
from sparse_seg.evaluation.evaluate import Evaluation
from sparse_seg.progress import say

LINE_SECONDS = 10.0  # at least, between two lines: an hour's stay under 40 kB


class Console:
    """Shows where a training is.

    Args:
        iteration: where it starts.
        shown: False keeps silent.
    """

    def __init__(self, config: TrainConfig, iteration: int, device: torch.device, shown: bool = True) -> None:
        self.config, self.device = config, device
        self.shown, terminal = shown, sys.stderr.isatty()
        self.lines = shown and not terminal
        self.bar = tqdm(
            total=config.iterations,
            initial=iteration,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            disable=not (shown and terminal),
        )
        now = time.monotonic()
        self.started = self.marked = now, iteration  # the run, and what a line tells of
        self.last_line, self.paused_for = now - LINE_SECONDS, 0.0

    def step(self, loss: float, best: float) -> None:
        """Count a step on the bar; a best mIoU below 0 is none."""
        numbers = {"loss": f"{loss:.3f}"} | ({"best": f"{best:.4f}"} if best >= 0 else {})
        steps, seconds = self.bar.n + 1 - self.started[1], self.bar.format_dict["elapsed"]
        numbers["images/s"] = f"{steps * self.config.batch_size / max(seconds, 1e-9):.1f}"
        self.bar.set_postfix(numbers, refresh=False)
        self.bar.update()

    def line(self, iteration: int, loss: float, rate: float) -> None:
        """Print a line, unless the last one is recent and this is not the end."""
        total, now = self.config.iterations, time.monotonic()
        if not self.lines or (now - self.last_line < LINE_SECONDS and iteration < total):
            return
        began, first = self.started
        left = timedelta(seconds=round((now - began) / max(iteration - first, 1) * (total - iteration)))
        began, first = self.marked
        seconds = max(now - began - self.paused_for, 1e-9)
        say(
            f"{self._place(iteration)}  loss {loss:.4f}  lr {rate:.3g}  "
            f"{(iteration - first) * self.config.batch_size / seconds:.1f} images/s  ETA {left}  "
            f"peak {_peak_mib(self.device):.0f} MiB"
        )
        self.marked, self.last_line, self.paused_for = (now, iteration), now, 0.0

    def validated(self, iteration: int, result: Evaluation, best: float) -> None:
        """Print a validation."""
        if not self.shown:
            return
        metrics = result.metrics
        say(
            f"{self._place(iteration)}  mIoU {metrics.miou:.4f}  boundary mIoU {metrics.boundary_miou:.4f}  "
            f"validation loss {math.nan if result.loss is None else result.loss:.4f}  best mIoU {best:.4f}"
        )

    def _place(self, iteration: int) -> str:
        total = self.config.iterations
        return f"iteration {iteration:{len(str(total))}} of {total}"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not a step's: validating, saving."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.paused_for += time.monotonic() - start

    def close(self) -> None:
        with suppress(OSError):
            self.bar.close()


def _peak_mib(device: torch.device) -> float:
    """The most memory that was in use: the GPU's, or that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
