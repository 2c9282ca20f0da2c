"""The training batches that a config describes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sparse_seg.config import Config
from sparse_seg.data.dataset import SegmentationDataset
from sparse_seg.data.loader import ResumableSampler, Sample, training_loader
from sparse_seg.data.resident import ResidentBatches
from sparse_seg.data.transforms import TrainTransform


def training_batches(
    dataset: SegmentationDataset,
    config: Config,
    start_iteration: int,
    iterations: int,
    part: tuple[int, int] = (0, 1),
    device: torch.device | None = None,
) -> Iterable[Sample]:
    """Iterations `start_iteration` to before `iterations`: float32 `[B, 3, h, w]` and int64 `[B, h, w]`.

    Args:
        part: (i, n) for the i-th of n parts of each batch.
        device: where frames are kept with `data.on_device`; None: they are read when needed.
    """
    data, train = config.data, config.train
    transform = TrainTransform(
        crop=(data.crop[0], data.crop[1]),
        scale_range=(data.scale_range[0], data.scale_range[1]),
        flip=data.flip,
        jitter=data.jitter,
        mean=data.mean,
        std=data.std,
        gamma=data.gamma,
        tint=data.tint,
    )
    keys = ResumableSampler(len(dataset), train.batch_size, train.seed, start_iteration, iterations, part)
    if data.on_device and device is not None:
        return ResidentBatches(dataset, transform, keys, train.seed, device)
    return training_loader(dataset, transform, keys, train.seed, data.workers, data.cache)
