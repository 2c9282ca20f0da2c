"""Datasets by name."""

import difflib
from pathlib import Path

from sparse_seg.data.camvid import CamVid
from sparse_seg.data.cityscapes import Cityscapes
from sparse_seg.data.dataset import IGNORE_INDEX, ClassList, SegmentationDataset
from sparse_seg.data.scenes import ScenesDataset
from sparse_seg.errors import ConfigError

__all__ = ["DATASETS", "IGNORE_INDEX", "ClassList", "SegmentationDataset", "build_dataset"]

DATASETS: dict[str, type[Cityscapes] | type[CamVid]] = {
    "cityscapes": Cityscapes,
    "camvid": CamVid,
    "scenes": ScenesDataset,
}


def build_dataset(name: str, root: str | Path, split: str) -> SegmentationDataset:
    """The dataset called `name` in folder `root`.

    Raises:
        ConfigError: no dataset has that name.
        DataError: the folder is missing or empty.
    """
    if name not in DATASETS:
        nearest = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ConfigError(f"unknown dataset {name!r}; {hint}valid names: {', '.join(sorted(DATASETS))}")
    return DATASETS[name](root, split)
