"""Metrics against slow references written from the definitions, pixel by pixel."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from sparse_seg.evaluation.metrics import MetricsResult, SegmentationMetrics, trimap

IGNORE = 255
K = 4

labels = arrays(
    np.int64, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.sampled_from([0, 1, 2, IGNORE])
)


def slow_band(label: np.ndarray, width: float) -> np.ndarray:
    height, columns = label.shape
    boundary = []
    for y, x in product(range(height), range(columns)):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        others = [label[j, i] for j, i in around if 0 <= j < height and 0 <= i < columns]
        if label[y, x] != IGNORE and any(other not in (IGNORE, label[y, x]) for other in others):
            boundary.append((y, x))
    band = np.zeros(label.shape, bool)
    for y, x in product(range(height), range(columns)):
        near = any((y - j) ** 2 + (x - i) ** 2 <= width**2 for j, i in boundary)
        band[y, x] = near and label[y, x] != IGNORE
    return band


def slow_class_iou(prediction: np.ndarray, label: np.ndarray, where: np.ndarray) -> list[float]:
    result = []
    for k in range(K):
        pairs = list(zip(prediction[where].tolist(), label[where].tolist(), strict=True))
        union = sum(p == k or t == k for p, t in pairs)
        result.append(sum(p == k and t == k for p, t in pairs) / union if union else math.nan)
    return result


def mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def random_pair(seed: int, shape: tuple[int, ...] = (3, 24, 31)) -> tuple[np.ndarray, np.ndarray]:
    """A prediction and a label of patches, with some ignored pixels; class 3 is in neither."""
    rng = np.random.default_rng(seed)
    patches = rng.choice([0, 1, 2, IGNORE], size=shape, p=[0.4, 0.3, 0.2, 0.1])
    label = patches.repeat(6, axis=-2)[..., : shape[-2], :].repeat(5, axis=-1)[..., : shape[-1]]
    prediction = np.where(rng.random(shape) < 0.3, rng.integers(0, 3, shape), label % IGNORE)
    return prediction, label


def measured(*pairs: tuple[np.ndarray, np.ndarray], width: float = 3) -> MetricsResult:
    metrics = SegmentationMetrics(K, width)
    for prediction, label in pairs:
        metrics.update(torch.from_numpy(prediction), torch.from_numpy(label))
    return metrics.result()


@given(labels, st.sampled_from([0, 1, 1.5, 2, 3, 5]))
def test_band_is_the_euclidean_neighbourhood_of_boundaries(label: np.ndarray, width: float) -> None:
    np.testing.assert_array_equal(trimap(label, width), slow_band(label, width))


@pytest.mark.parametrize("seed", range(2))
def test_metrics_equal_their_definition(seed: int) -> None:
    """Of a batch, which is the same as its images one by one."""
    prediction, label = random_pair(seed)
    result = measured((prediction, label), width=1)
    assert (
        result.as_dict()
        == measured(*((prediction[i : i + 1], label[i : i + 1]) for i in range(3)), width=1).as_dict()
    )
    valid, band = label != IGNORE, np.stack([slow_band(image, 1) for image in label])
    assert 0 < band.sum() < valid.sum()
    class_iou = slow_class_iou(prediction, label, valid)
    assert result.class_iou == pytest.approx(class_iou, nan_ok=True)
    assert math.isnan(result.class_iou[3])
    assert result.miou == pytest.approx(mean(class_iou))
    assert result.boundary_miou == pytest.approx(mean(slow_class_iou(prediction, label, band)))
    assert result.pixel_accuracy == pytest.approx(float((prediction == label)[valid].mean()))
    for t, p in product(range(K), range(K)):
        assert result.confusion[t, p] == ((label == t) & (prediction == p)).sum()


@given(labels)
def test_a_perfect_prediction_scores_one_or_nothing(label: np.ndarray) -> None:
    result = measured((np.where(label == IGNORE, 3, label)[None], label[None]))
    for value in (result.miou, result.pixel_accuracy, result.boundary_miou, *result.class_iou):
        assert value == 1 or math.isnan(value)
    assert math.isnan(result.miou) == bool((label == IGNORE).all())


def test_nothing_measured_is_null_in_json_and_later_images_do_not_change_a_result() -> None:
    metrics = SegmentationMetrics(2)
    nothing = metrics.result()
    metrics.update(torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2, 2, dtype=torch.int64))
    assert nothing.as_dict() == {
        "miou": None,
        "pixel_accuracy": None,
        "boundary_miou": None,
        "class_iou": [None, None],
        "confusion": [[0, 0], [0, 0]],
    }
