"""ADE20K's scene parsing benchmark (`ADEChallengeData2016`): 150 classes, `images/` and `annotations/`."""

from pathlib import Path

from sparse_seg.data.class_file import read_classes
from sparse_seg.data.dataset import SegmentationDataset
from sparse_seg.data.listing import pair_files

_KNOWN = read_classes("ade20k")
_FOLDERS = {"train": "training", "val": "validation"}


class ADE20K(SegmentationDataset):
    """ADE20K's 150 classes, 1..150 on disk; 0, which is everything else, is ignored.

    Args:
        root: the folder that holds `images` and `annotations`.
        split: `train` or `val`, or the name of a folder in both.

    Raises:
        DataError: a folder is missing or holds no image.
    """

    classes, train_ids = _KNOWN.classes, _KNOWN.train_ids

    def __init__(self, root: str | Path, split: str) -> None:
        folder = _FOLDERS.get(split, split)
        super().__init__(
            *pair_files(Path(root, "images", folder), Path(root, "annotations", folder), (".jpg",))
        )
