"""CamVid in SegNet's folders: images in `{split}/`, labels of 11 classes in `{split}annot/`, same stem."""

from pathlib import Path

from sparse_seg.data.class_file import read_classes
from sparse_seg.data.dataset import SegmentationDataset
from sparse_seg.data.listing import pair_files

_KNOWN = read_classes("camvid")


class CamVid(SegmentationDataset):
    """CamVid's 11 classes; void is ignored.

    Args:
        root: the folder that holds `{split}` (`.jpg` or `.png`) and `{split}annot` (`.png`).
        split: `train`, `val` or `test`.

    Raises:
        DataError: a folder is missing or holds no image, or two images share a stem.
    """

    classes, train_ids = _KNOWN.classes, _KNOWN.train_ids

    def __init__(self, root: str | Path, split: str) -> None:
        super().__init__(*pair_files(Path(root, split), Path(root, f"{split}annot"), (".jpg", ".png")))
