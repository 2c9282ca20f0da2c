"""Run a network over a dataset and measure it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from sparse_seg.config import DataConfig
from sparse_seg.data.batches import evaluation_loader
from sparse_seg.data.dataset import IGNORE_INDEX, SegmentationDataset
from sparse_seg.errors import DataError
from sparse_seg.evaluation.metrics import MetricsResult, SegmentationMetrics
from sparse_seg.evaluation.views import ONCE, Views, predict, single
from sparse_seg.export.runner import Runner
from sparse_seg.ops.upsample import sampled_pixels
from sparse_seg.processes import Processes
from sparse_seg.progress import bar
from sparse_seg.run.modes import eval_mode
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.timing import now

LOSS_STEP = 4  # a sixteenth of the pixels estimates the loss well, and costs little beside the network


@dataclass(frozen=True)
class Evaluation:
    """Result of a run over a dataset: metrics, mean share of fine blocks (None when dense), speed."""

    metrics: MetricsResult
    fine_fraction: float | None  # share of blocks at the finest stride
    images: int
    seconds: float  # in mask policy and network, in the slowest process; loading and metrics not counted
    loss: float | None = None  # mean cross-entropy of labelled pixels, if measured

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.metrics.as_dict() | {
            "fine_fraction": self.fine_fraction,
            "images": self.images,
            "images_per_second": self.images_per_second,
        }


@dataclass
class Tally:
    """What one process measured of its frames."""

    metrics: SegmentationMetrics
    fractions: list[float] = field(default_factory=list)  # of fine blocks, by frame
    losses: list[tuple[float, int]] = field(default_factory=list)  # (sum, pixels) by frame
    seconds: float = 0.0
    images: int = 0


def evaluate(
    model: SelectiveNetwork,
    dataset: SegmentationDataset,
    data: DataConfig,
    way: Way | None = None,
    limit: int | None = None,
    views: Views = ONCE,
    processes: Processes | None = None,
    runner: Runner | None = None,
) -> Evaluation:
    """Metrics of the dataset's first `limit` images (default: all), one image at a time, in eval mode.

    Args:
        way: how to run; by default selective under the model's own policy.
        views: whole or through windows, with or without test-time augmentation.
        processes: that share the frames; all return the result that one alone would (but for policy
            `previous`, which starts anew with the first frame of each).
        runner: runs the network elsewhere; by default it runs as it is.

    Every module's mode is put back.

    Raises:
        DataError: an image cannot be read, in any process.
    """
    processes = processes or Processes()
    frames = processes.share(len(dataset) if limit is None else min(limit, len(dataset)))
    part = partial(measure, model, dataset, data, way or Way(), frames, processes.is_first)
    return combined(processes.gather(lambda: part(views=views, runner=runner)))


def measure(
    model: SelectiveNetwork,
    dataset: SegmentationDataset,
    data: DataConfig,
    way: Way,
    frames: range,
    progress: bool = False,
    with_loss: bool = False,
    views: Views = ONCE,
    runner: Runner | None = None,
) -> Tally:
    """Run a network on some frames; see `evaluate`.

    Args:
        with_loss: also measure the plain cross-entropy, at every `LOSS_STEP`-th pixel of rows and columns.
    """
    policy = None if way.is_dense else (runner or model).policy_for(way)
    if policy is not None:
        policy.remember(None)
    device = model.device
    part = Tally(SegmentationMetrics(len(dataset.classes)), images=len(frames))
    loader = evaluation_loader(dataset, data, frames)
    if runner is not None:
        runner.expect(len(frames) if views.is_single else None)
    with torch.inference_mode(), eval_mode(model):
        for image, label, index in bar(loader, "evaluate", len(frames), progress):
            if policy is not None and dataset.starts(index):
                policy.remember(None)
            image, label = image.to(device), label.to(device)
            start = now(device) - (runner.seconds if runner else 0)
            run = model.start(image, label).follow(way, policy) if with_loss else None
            try:
                found = (
                    predict(runner or model, image, label, way, policy, views) if run is None else single(run)
                )
            except ValueError as error:
                raise DataError(f"{dataset.name(index)}: {error}") from None
            part.seconds += now(device) - (runner.seconds if runner else 0) - start
            part.metrics.update(found.classes, label)
            if found.levels is not None:
                part.fractions.append((found.levels == len(model.strides) - 1).float().mean().item())
            if run is not None:
                logits = run.upsample(run.grid_logits(), LOSS_STEP)
                rows, columns = (sampled_pixels(n, LOSS_STEP).to(device) for n in label.shape[1:])
                target = label[:, rows[:, None], columns]
                total = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")
                part.losses.append((total.item(), int((target != IGNORE_INDEX).sum())))
    return part


def combined(parts: Sequence[Tally]) -> Evaluation:
    """The result of all frames; sums go by frame, so that it does not depend on how they were shared."""
    metrics = parts[0].metrics
    for part in parts[1:]:
        metrics.add(part.metrics)
    fractions = [fraction for part in parts for fraction in part.fractions]
    losses = [loss for part in parts for loss in part.losses]
    pixels = sum(count for _, count in losses)
    return Evaluation(
        metrics.result(),
        sum(fractions) / len(fractions) if fractions else None,
        sum(part.images for part in parts),
        max(part.seconds for part in parts),
        sum(loss for loss, _ in losses) / pixels if pixels else None,
    )
