"""Mean IoU, pixel accuracy and boundary mIoU, accumulated over a dataset.

- mIoU: intersection over union per class over the whole dataset, then the mean over classes (Everingham et
  al., "The PASCAL Visual Object Classes Challenge", IJCV 2010; "mean IU" in Long et al., CVPR 2015).
- boundary mIoU: the same inside a trimap, a narrow band around label boundaries (Kohli et al., "Robust
  Higher Order Potentials for Enforcing Label Consistency", IJCV 2009; reported as mIoU by DeepLab, Chen et
  al., TPAMI 2018). They draw the band around PASCAL's void outline; Cityscapes and CamVid have none, so
  here it lies around boundaries between two labelled classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparse_seg.data.dataset import IGNORE_INDEX

Confusion = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class MetricsResult:
    """Metrics in 0..1; nan where nothing was there to measure."""

    miou: float
    pixel_accuracy: float
    boundary_miou: float
    class_iou: list[float]  # [K], nan where a class has neither label nor prediction
    confusion: Confusion  # [K, K], rows = label, columns = prediction

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, nan as None."""
        return {
            "miou": _none_if_nan(self.miou),
            "pixel_accuracy": _none_if_nan(self.pixel_accuracy),
            "boundary_miou": _none_if_nan(self.boundary_miou),
            "class_iou": [_none_if_nan(iou) for iou in self.class_iou],
            "confusion": self.confusion.tolist(),
        }


class SegmentationMetrics:
    """Confusion matrices of a dataset: over all labelled pixels, and over the trimap band."""

    def __init__(self, num_classes: int, trimap_width: float = 3) -> None:
        """`trimap_width` in pixels."""
        self.num_classes, self.trimap_width = num_classes, trimap_width
        self.confusion: Confusion = np.zeros((num_classes, num_classes), np.int64)
        self.boundary_confusion = self.confusion.copy()

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Add images: integers `[B, H, W]`, of the classes, in the label also `IGNORE_INDEX`."""
        predicted, labelled = prediction.cpu().numpy(), label.cpu().numpy()
        valid = labelled != IGNORE_INDEX
        band = np.stack([trimap(image, self.trimap_width) for image in labelled])
        self.confusion += self._count(predicted[valid], labelled[valid])
        self.boundary_confusion += self._count(predicted[band], labelled[band])

    def add(self, other: SegmentationMetrics) -> None:
        """Add the images of another sum with the same classes."""
        self.confusion += other.confusion
        self.boundary_confusion += other.boundary_confusion

    def result(self) -> MetricsResult:
        """The metrics of everything added so far."""
        class_iou = _class_iou(self.confusion)
        total = int(self.confusion.sum())
        return MetricsResult(
            miou=_mean(class_iou),
            pixel_accuracy=int(self.confusion.trace()) / total if total else math.nan,
            boundary_miou=_mean(_class_iou(self.boundary_confusion)),
            class_iou=class_iou.tolist(),
            confusion=self.confusion.copy(),
        )

    def _count(self, prediction: np.ndarray, label: np.ndarray) -> Confusion:
        pairs = label.astype(np.int64) * self.num_classes + prediction
        counts = np.bincount(pairs, minlength=self.num_classes**2)
        return counts.reshape(self.num_classes, self.num_classes)


def trimap(label: np.ndarray, width: float) -> npt.NDArray[np.bool_]:
    """The trimap: labelled pixels at most `width` px (Euclidean) from a pixel on a class boundary.

    A pixel is on a boundary if one of its 4 neighbours has another class; a border with ignored pixels is
    none. label: [H, W] integers. Returns [H, W] bool, all False where the image has no boundary.
    """
    valid = label != IGNORE_INDEX
    boundary = np.zeros(label.shape, bool)
    across = (label[:, 1:] != label[:, :-1]) & valid[:, 1:] & valid[:, :-1]
    down = (label[1:] != label[:-1]) & valid[1:] & valid[:-1]
    boundary[:, 1:] |= across
    boundary[:, :-1] |= across
    boundary[1:] |= down
    boundary[:-1] |= down
    if not boundary.any():
        return boundary
    distance = cv2.distanceTransform((~boundary).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return valid & (distance <= width)


def _class_iou(confusion: Confusion) -> npt.NDArray[np.float64]:
    """IoU [K] from a confusion matrix [K, K]; nan where a class has neither label nor prediction."""
    intersection = np.diag(confusion)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - intersection
    iou = np.full(len(confusion), np.nan)
    return np.divide(intersection, union, out=iou, where=union > 0)


def _mean(values: npt.NDArray[np.float64]) -> float:
    """Mean of the values that are not nan; nan if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
