"""PASCAL VOC 2012: `JPEGImages`, palette labels in `SegmentationClass`, lists in `ImageSets/Segmentation`."""

from pathlib import Path

from sparse_seg.data.dataset import IGNORE_INDEX, ClassList, SegmentationDataset
from sparse_seg.data.palette import default_palette
from sparse_seg.errors import DataError

_NAMES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)
_BORDER = 255

VOC_CLASSES = ClassList(_NAMES, default_palette(len(_NAMES)))


class VOC(SegmentationDataset):
    """VOC 2012's 21 classes; the borders of objects are ignored.

    Args:
        root: the folder `VOC2012` of the devkit.
        split: `train`, `val` or `trainval`: a list in `ImageSets/Segmentation`.

    Raises:
        DataError: the list is missing or names no image.
    """

    classes = VOC_CLASSES
    train_ids = {number: number for number in range(len(_NAMES))} | {_BORDER: IGNORE_INDEX}

    def __init__(self, root: str | Path, split: str) -> None:
        listed = Path(root, "ImageSets", "Segmentation", f"{split}.txt")
        try:
            names = listed.read_text().split()
        except (OSError, UnicodeDecodeError):
            raise DataError(f"{listed}: no such list of images; check the dataset's root and split") from None
        if not names:
            raise DataError(f"{listed}: names no image; restore it from the original dataset")
        images, labels = Path(root, "JPEGImages"), Path(root, "SegmentationClass")
        super().__init__([(images / f"{name}.jpg", labels / f"{name}.png") for name in names], [])
