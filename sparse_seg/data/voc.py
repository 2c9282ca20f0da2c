"""PASCAL VOC 2012: `JPEGImages`, palette labels in `SegmentationClass`, lists in `ImageSets/Segmentation`."""

from pathlib import Path

from sparse_seg.data.class_file import read_classes
from sparse_seg.data.dataset import SegmentationDataset
from sparse_seg.data.listing import as_stored, read_list
from sparse_seg.errors import DataError

_KNOWN = read_classes("voc")


class VOC(SegmentationDataset):
    """VOC 2012's 21 classes; the borders of objects are ignored.

    Args:
        root: the folder `VOC2012` of the devkit.
        split: `train`, `val` or `trainval`: a list in `ImageSets/Segmentation`.

    Raises:
        DataError: the list is missing or names no image.
    """

    classes, train_ids = _KNOWN.classes, _KNOWN.train_ids

    def __init__(self, root: str | Path, split: str) -> None:
        listed = Path(root, "ImageSets", "Segmentation", f"{split}.txt")
        names = read_list(listed)
        if not names:
            raise DataError(f"{listed}: names no image; restore it from the original dataset")
        images, labels = Path(root, "JPEGImages"), Path(root, "SegmentationClass")
        pairs = ((images / f"{name}.jpg", labels / f"{name}.png") for name in names)
        super().__init__([(as_stored(image), as_stored(label)) for image, label in pairs], [])

    def sequence(self, index: int) -> None:
        """Single photos; their names begin with the year."""
