"""Mean IoU, pixel accuracy and boundary mIoU, accumulated over a dataset.

- mIoU: intersection over union per class over the whole dataset, then the mean over classes (Everingham et
  al., "The PASCAL Visual Object Classes Challenge", IJCV 2010; "mean IU" in Long et al., CVPR 2015).
- boundary mIoU: the same inside a trimap, a narrow band around label boundaries (Kohli et al., "Robust
  Higher Order Potentials for Enforcing Label Consistency", IJCV 2009; reported as mIoU by DeepLab, Chen et
  al., TPAMI 2018). They draw the band around PASCAL's void outline; Cityscapes and CamVid have none, so
  here it lies around boundaries between two labelled classes.
"""

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

Confusion = npt.NDArray[np.int64]
Labels = np.ndarray | torch.Tensor


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

    def __init__(self, num_classes: int, ignore_index: int = 255, trimap_width: float = 3) -> None:
        """`trimap_width` in pixels."""
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.trimap_width = trimap_width
        self.confusion: Confusion = np.zeros((num_classes, num_classes), np.int64)
        self.boundary_confusion: Confusion = np.zeros((num_classes, num_classes), np.int64)

    def update(self, prediction: Labels, label: Labels) -> None:
        """Add one image or a batch.

        prediction, label: [H, W] or [B, H, W], integers; prediction in 0..K-1, label also `ignore_index`.
        Raises ValueError if shapes differ, a dtype is not integer or a value is out of range.
        """
        predicted = _as_integers(prediction, "prediction")
        labelled = _as_integers(label, "label")
        if predicted.shape != labelled.shape or predicted.ndim not in (2, 3):
            raise ValueError(
                f"prediction and label must both be [H, W] or [B, H, W], "
                f"got {list(predicted.shape)} and {list(labelled.shape)}"
            )
        valid = labelled != self.ignore_index
        self._check_range(predicted, "prediction")
        self._check_range(labelled[valid], "label")
        images = labelled.reshape(-1, *labelled.shape[-2:])
        bands = [trimap(image, self.trimap_width, self.ignore_index) for image in images]
        band = np.array(bands, bool).reshape(labelled.shape)
        self.confusion += self._count(predicted[valid], labelled[valid])
        self.boundary_confusion += self._count(predicted[band], labelled[band])

    def add(self, other: "SegmentationMetrics") -> None:
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

    def _check_range(self, values: np.ndarray, name: str) -> None:
        if values.size and not (values.min() >= 0 and values.max() < self.num_classes):
            raise ValueError(
                f"{name} has values {values.min()}..{values.max()}, outside 0..{self.num_classes - 1}"
            )

    def _count(self, prediction: np.ndarray, label: np.ndarray) -> Confusion:
        pairs = label.astype(np.int64) * self.num_classes + prediction
        counts = np.bincount(pairs, minlength=self.num_classes**2)
        return counts.reshape(self.num_classes, self.num_classes)


def trimap(label: np.ndarray, width: float, ignore_index: int = 255) -> npt.NDArray[np.bool_]:
    """The trimap: labelled pixels at most `width` px (Euclidean) from a pixel on a class boundary.

    A pixel is on a boundary if one of its 4 neighbours has another class; a border with ignored pixels is
    none. label: [H, W] integers. Returns [H, W] bool, all False where the image has no boundary.
    """
    valid = label != ignore_index
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


def _as_integers(values: Labels, name: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must have an integer dtype, got {array.dtype}")
    return array


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
