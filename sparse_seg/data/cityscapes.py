"""Cityscapes: `leftImg8bit/{split}/{city}/*_leftImg8bit.png` and `gtFine/.../*_gtFine_labelIds.png`."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparse_seg.data.class_file import known_classes
from sparse_seg.data.dataset import SegmentationDataset, ranges
from sparse_seg.data.listing import composed, list_files
from sparse_seg.errors import DataError

_KNOWN = known_classes("cityscapes")
CITYSCAPES_CLASSES = _KNOWN.classes
CITYSCAPES_IDS = dict(zip(CITYSCAPES_CLASSES.names, _KNOWN.ids, strict=True))
"""Label id on disk of each evaluated class."""

IMAGE_SUFFIX = "_leftImg8bit.png"
LABEL_SUFFIX = "_gtFine_labelIds.png"
_NOT_READ = tuple(
    f"_gtFine_{kind}"
    for kind in ("color.png", "instanceIds.png", "labelTrainIds.png", "instanceTrainIds.png", "polygons.json")
)
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
        image_files = list_files(
            images,
            lambda file: file.parent.parent == images and file.name.endswith(IMAGE_SUFFIX),
            f"images are {{city}}/*{IMAGE_SUFFIX}",
        )
        label_files = [
            file
            for file in list_files(
                labels,
                lambda file: file.parent.parent == labels and file.name.endswith((LABEL_SUFFIX, *_NOT_READ)),
                f"labels are {{city}}/*{LABEL_SUFFIX}",
            )
            if file.name.endswith(LABEL_SUFFIX)
        ]
        if not image_files:
            raise DataError(
                f"{images}: no {{city}}/*{IMAGE_SUFFIX} in it; unpack leftImg8bit_trainvaltest.zip"
            )
        stored = {composed(file): file for file in label_files}
        wanted = [labels / file.parent.name / _label_name(file) for file in image_files]
        samples = [
            (file, stored.get(composed(label), label))
            for file, label in zip(image_files, wanted, strict=True)
        ]
        super().__init__(samples, label_files)

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
        sequences = [self.name(number).rpartition("_")[0] for number in (max(index - 1, 0), index)]
        return index == 0 or sequences[0] != sequences[1]


def _label_name(image_file: Path) -> str:
    return image_file.name.removesuffix(IMAGE_SUFFIX) + LABEL_SUFFIX
