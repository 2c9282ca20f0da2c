"""An evaluation as text."""

from __future__ import annotations

from sparse_seg.data.dataset import ClassList
from sparse_seg.evaluation.evaluate import Evaluation
from sparse_seg.lab.report.tables import Column, Table


def class_table(evaluation: Evaluation, classes: ClassList) -> Table:
    """IoU per class, in percent."""
    columns = [Column("name", "class"), Column("iou", "IoU %", "{:.1f}")]
    ious = evaluation.metrics.class_iou
    return Table(columns, [{"name": n, "iou": 100 * iou} for n, iou in zip(classes.names, ious, strict=True)])


def summary(evaluation: Evaluation) -> str:
    """One line: the figures of the whole dataset."""
    metrics = evaluation.metrics
    fine = evaluation.fine_fraction
    mode = "dense" if fine is None else f"fine fraction {fine:.3f}"
    return (
        f"mIoU {100 * metrics.miou:.2f}  boundary mIoU {100 * metrics.boundary_miou:.2f}  "
        f"pixel accuracy {100 * metrics.pixel_accuracy:.2f}  ({mode}; {evaluation.images} images, "
        f"{evaluation.images_per_second:.2f} images/s)"
    )
