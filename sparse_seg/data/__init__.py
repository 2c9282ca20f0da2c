"""Datasets by name."""

from pathlib import Path

from sparse_seg.data.dataset import IGNORE_INDEX, ClassList, SegmentationDataset, label_ids
from sparse_seg.registry import DATASETS

__all__ = [
    "DATASETS",
    "IGNORE_INDEX",
    "ClassList",
    "SegmentationDataset",
    "build_dataset",
    "dataset_classes",
    "dataset_ids",
]


def build_dataset(name: str, root: str | Path, split: str) -> SegmentationDataset:
    """The dataset called `name` in folder `root`.

    Raises:
        ConfigError: no dataset has that name.
        DataError: the folder is missing or empty.
    """
    return DATASETS[name](root, split)


def dataset_classes(name: str, root: str | Path) -> ClassList:
    """The classes of the dataset called `name`; for `folder` they stand in `root`.

    Raises:
        ConfigError: no dataset has that name, or the folder's `classes.yaml` is missing or wrong.
    """
    return DATASETS[name].classes_in(root)


def dataset_ids(name: str, root: str | Path) -> tuple[int, ...]:
    """The value of each class in the labels of the dataset called `name`.

    Raises:
        ConfigError: as `dataset_classes`.
    """
    return label_ids(DATASETS[name].train_ids_in(root), len(dataset_classes(name, root)))
