"""Datasets by name."""

import functools
from contextlib import suppress
from pathlib import Path

from sparse_seg.data.dataset import IGNORE_INDEX, ClassList, SegmentationDataset, label_ids
from sparse_seg.data.listing import unsaid
from sparse_seg.errors import SparseSegError
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

SPLITS = ("train", "val", "test")  # that a data set usually has


def build_dataset(name: str, root: str | Path, split: str, bits: int | None = None) -> SegmentationDataset:
    """The dataset called `name` in folder `root`.

    Args:
        bits: how many of 16 bits per channel its images use; None: as all its splits together tell.

    Raises:
        ConfigError: no dataset has that name.
        DataError: the folder is missing or empty.
    """
    dataset = DATASETS[name](root, split)
    dataset.bits = bits
    dataset.other_images = functools.partial(_images, name, root, split)
    return dataset


def _images(name: str, root: str | Path, without: str) -> list[Path]:
    """Images of the splits that are there; what their folders lack is said to whoever uses them."""
    files = list[Path]()
    for split in SPLITS:
        if split != without:
            with suppress(SparseSegError, OSError), unsaid():
                files += [image for image, _ in DATASETS[name](root, split).samples]
    return files


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
