"""Cityscapes: `leftImg8bit/{split}/{city}/*_leftImg8bit.png` and `gtFine/.../*_gtFine_labelIds.png`."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparse_seg.data.class_file import read_classes
from sparse_seg.data.dataset import SegmentationDataset, ranges
from sparse_seg.data.listing import pair_files

_KNOWN = read_classes("cityscapes")
CITYSCAPES_CLASSES = _KNOWN.classes
CITYSCAPES_IDS = dict(zip(CITYSCAPES_CLASSES.names, _KNOWN.ids, strict=True))
"""Label id on disk of each evaluated class."""

IMAGE_SUFFIX = "_leftImg8bit.png"
LABEL_SUFFIX = "_gtFine_labelIds.png"
_BESIDE = ("_gtFine_color.png", "Ids.png", "_gtFine_polygons.json")  # ends of names of other labels
_TELLING = range(19, 34)  # label ids that are no train ids; each train id is a label id too


class Cityscapes(SegmentationDataset):
    """The 19 evaluated classes of Cityscapes; every other label id is ignored.

    Args:
        root: the folder that holds `leftImg8bit` and `gtFine`.
        split: `train`, `val` or another folder name below both.

    Raises:
        DataError: a folder is missing or holds no image.
    """

    classes, train_ids = _KNOWN.classes, _KNOWN.train_ids

    def __init__(self, root: str | Path, split: str) -> None:
        images, labels = Path(root, "leftImg8bit", split), Path(root, "gtFine", split)
        super().__init__(*pair_files(images, labels, (IMAGE_SUFFIX,), LABEL_SUFFIX, _BESIDE))

    def _check_values(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        classes = super()._check_values(counts)
        if not counts[_TELLING].any():
            self.warn(
                f"the values in the labels are {ranges(np.flatnonzero(counts))}, none from {_TELLING[0]} to "
                f"{_TELLING[-1]} (vegetation, sky, car ...): if they are train ids, other classes are "
                f"learnt; *{LABEL_SUFFIX} must hold label ids"
            )
        return classes

    def name(self, index: int) -> str:
        return self.samples[index][0].name.removesuffix(IMAGE_SUFFIX)

    def starts(self, index: int) -> bool:
        """By names: `CITY_SEQUENCE_FRAME`."""
        before, own = (self.name(number).rpartition("_")[0] for number in (index - 1, index))
        return index == 0 or before != own
