"""Cityscapes: `leftImg8bit/{split}/{city}/*_leftImg8bit.png` and `gtFine/.../*_gtFine_labelIds.png`."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparse_seg.data.dataset import IGNORE_INDEX, ClassList, SegmentationDataset, ranges
from sparse_seg.data.listing import composed, list_files
from sparse_seg.errors import DataError

# Train id order: (name, label id in *_labelIds.png, RGB colour), as in cityscapesScripts' labels.py.
_TABLE: tuple[tuple[str, int, tuple[int, int, int]], ...] = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
_LICENSE_PLATE = 255  # label id -1 in an 8-bit file

CITYSCAPES_CLASSES = ClassList(tuple(row[0] for row in _TABLE), tuple(row[2] for row in _TABLE))
CITYSCAPES_IDS = {name: label_id for name, label_id, _ in _TABLE}
"""Label id on disk of each evaluated class."""

_TRAIN_IDS = dict.fromkeys((*range(34), _LICENSE_PLATE), IGNORE_INDEX) | {
    label_id: train_id for train_id, (_, label_id, _) in enumerate(_TABLE)
}
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

    classes = CITYSCAPES_CLASSES
    train_ids = _TRAIN_IDS

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
