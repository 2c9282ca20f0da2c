"""Datasets by name."""

import functools
from contextlib import suppress
from pathlib import Path

from sparse_seg.config import DataConfig
from sparse_seg.data.class_file import ClassFile
from sparse_seg.data.dataset import IGNORE_INDEX, ClassList, SegmentationDataset
from sparse_seg.data.listing import unsaid
from sparse_seg.errors import ConfigError, SparseSegError, choose_one
from sparse_seg.registry import DATASETS

__all__ = [
    "DATASETS",
    "IGNORE_INDEX",
    "ClassList",
    "SegmentationDataset",
    "build_dataset",
    "dataset_classes",
    "open_split",
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
    dataset.all_images = functools.partial(_images, name, root)
    return dataset


def open_split(data: DataConfig, split: str) -> SegmentationDataset:
    """A split as a config has it, see its keys `train_on` and `withheld`.

    Raises:
        ConfigError: no dataset has that name, or no frame begins as one of `withheld`, or every one does.
        DataError: a folder is missing or empty.
    """
    withheld = tuple(data.withheld or ())
    shared = split == "train" or (split == "val" and withheld)
    splits = data.train_on if shared else [split]
    dataset, *others = (build_dataset(data.dataset, data.root, one, data.bits) for one in splits)
    for other in others:
        dataset.join(other)
    if shared and withheld:
        _part(dataset, withheld, split)
    return dataset


def _part(dataset: SegmentationDataset, withheld: tuple[str, ...], split: str) -> None:
    """Keep the frames that are withheld, or to train all others."""
    names = [dataset.name(index) for index in range(len(dataset))]
    for start in withheld:
        if not any(name.startswith(start) for name in names):
            known = sorted({one for index in range(len(dataset)) if (one := dataset.sequence(index))})
            hint = choose_one(start, known) if known else f"{start!r}; names are such as {names[0]!r}"
            raise ConfigError(f"data.withheld: no frame of data.train_on begins with {hint}")
    dataset.keep(lambda name: name.startswith(withheld) == (split == "val"))
    if not len(dataset):
        raise ConfigError("data.withheld leaves no frame to train; withhold fewer, or add to data.train_on")


def _images(name: str, root: str | Path) -> list[Path]:
    """Images of the splits that are there; what their folders lack is said to whoever uses them."""
    files = list[Path]()
    for split in SPLITS:
        with suppress(SparseSegError, OSError), unsaid():
            files += [image for image, _ in DATASETS[name](root, split).samples]
    return files


def dataset_classes(name: str, root: str | Path) -> ClassFile:
    """The classes of the dataset called `name`, and their values in labels; for `folder` they stand in
    `root`.

    Raises:
        ConfigError: no dataset has that name, or the folder's `classes.yaml` is missing or wrong.
    """
    return DATASETS[name].known_in(root)
