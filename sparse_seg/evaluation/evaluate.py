"""Run a network over a dataset and measure it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from sparse_seg.config import DataConfig
from sparse_seg.data.dataset import IGNORE_INDEX, SegmentationDataset
from sparse_seg.data.loader import evaluation_loader
from sparse_seg.evaluation.metrics import MetricsResult, SegmentationMetrics
from sparse_seg.evaluation.views import ONCE, Views, predict
from sparse_seg.models.passes import eval_mode, now
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.models.way import Way


@dataclass(frozen=True)
class Evaluation:
    """Result of a run over a dataset: metrics, mean share of fine blocks (None when dense), speed."""

    metrics: MetricsResult
    fine_fraction: float | None  # share of blocks at the finest stride
    images: int
    seconds: float  # in mask policy and network; loading and metrics not counted

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


def evaluate(
    model: SelectiveSegmentor,
    dataset: SegmentationDataset,
    data: DataConfig,
    way: Way | None = None,
    limit: int | None = None,
    progress: bool = False,
    views: Views = ONCE,
) -> Evaluation:
    """Metrics of the dataset's first `limit` images (default: all), one image at a time, in eval mode.

    Args:
        way: how to run; by default selective under the model's own policy.
        views: whole or through windows, with or without test-time augmentation.

    Every module's mode is put back.
    """
    way = way or Way()
    policy = None if way.is_dense else model.policy_for(way)
    if policy is not None:
        policy.remember(None)
    device = next(model.parameters()).device
    metrics = SegmentationMetrics(len(dataset.classes), IGNORE_INDEX)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    loader = evaluation_loader(dataset, data.mean, data.std, data.workers)
    fractions, seconds = [], 0.0
    with torch.inference_mode(), eval_mode(model):
        for image, label, index in tqdm(
            loader, total=count, disable=not progress, desc="evaluate", leave=False
        ):
            if index >= count:
                break
            image, label = image.to(device), label.to(device)
            start = now(device)
            found = predict(model, image, label, way, policy, views)
            seconds += now(device) - start
            metrics.update(found.classes, label)
            if found.levels is not None:
                fractions.append((found.levels == len(model.strides) - 1).float().mean().item())
    fine_fraction = sum(fractions) / len(fractions) if fractions else None
    return Evaluation(metrics.result(), fine_fraction, count, seconds)
