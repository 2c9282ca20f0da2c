"""Validation in a training: the share of each process, and what the log keeps of it."""

from __future__ import annotations

import math
from typing import Any

from sparse_seg.config import Config
from sparse_seg.data.dataset import ClassList, SegmentationDataset
from sparse_seg.evaluation.evaluate import Evaluation, Part, combined, measure
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.training.stopping import Stop, ValidationStopped


def validate(
    model: SelectiveNetwork, dataset: SegmentationDataset, config: Config, stop: Stop
) -> Evaluation | None:
    """Measure a model as its training runs it; None where a request to stop ends it in any process.

    Raises:
        DataError: an image cannot be read, in any process.
    """
    train, total = config.train, len(dataset)
    way = Way.dense(train.output_stride or model.dense_stride) if train.network == "dense" else Way()
    frames = stop.processes.share(total if train.eval_images is None else min(total, train.eval_images))

    def work() -> Part | None:
        stop.interrupts = True
        try:
            return measure(model, dataset, config.data, way, frames, with_loss=True)
        except ValidationStopped:
            return None
        finally:
            stop.interrupts = False

    stop.processes.share_buffers(model)
    parts = stop.processes.gather(work)
    done = [part for part in parts if part is not None]
    return combined(done) if len(done) == len(parts) else None


def logged(result: Evaluation, classes: ClassList) -> dict[str, Any]:
    """The numbers of a validation, by name."""
    metrics = result.metrics
    return {
        "miou": metrics.miou,
        "boundary_miou": metrics.boundary_miou,
        "pixel_accuracy": metrics.pixel_accuracy,
        "val_loss": math.nan if result.loss is None else result.loss,
        "class_iou": dict(zip(classes.names, metrics.class_iou, strict=True)),
    }
