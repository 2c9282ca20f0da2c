"""Label ids against a table typed from cityscapesScripts' documentation, and the folder layout."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from sparse_seg.data import build_dataset
from sparse_seg.data.cityscapes import Cityscapes
from sparse_seg.errors import DataError

_IGNORED = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255)
_TRAIN_ID_OF = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
    27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip


def write_pair(root: Path, city: str, stem: str, ids: np.ndarray) -> None:
    for folder, suffix, pixels in (
        ("leftImg8bit", "leftImg8bit", np.zeros((*ids.shape, 3), np.uint8)),
        ("gtFine", "gtFine_labelIds", ids),
    ):
        file = root / folder / "val" / city / f"{stem}_{suffix}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(file), pixels)


def test_every_label_id(tmp_path: Path) -> None:
    ids = np.tile(np.array([*_TRAIN_ID_OF, *_IGNORED], np.uint8), (32, 1))
    assert sorted(ids[0]) == [*range(34), 255]
    write_pair(tmp_path, "ulm", "ulm_000000_000019", ids)
    dataset = build_dataset("cityscapes", tmp_path, "val")
    dataset.check()
    _, label = dataset.load(0)
    assert label[0].tolist() == [*_TRAIN_ID_OF.values(), *[255] * len(_IGNORED)]


def test_a_citys_label_in_another_form_of_unicode(tmp_path: Path) -> None:
    composed, apart = "n\u00fcrnberg", "nu\u0308rnberg"
    write_pair(tmp_path, composed, f"{composed}_000000_000019", np.full((32, 32), 7, np.uint8))
    (tmp_path / "gtFine/val" / composed).rename(tmp_path / "gtFine/val" / apart)
    dataset = build_dataset("cityscapes", tmp_path, "val")
    assert dataset.check()[0] == 32 * 32
    assert dataset.samples[0][1].parent.name == apart


@pytest.mark.parametrize("value", [34, 200, 254])
def test_other_label_ids_are_errors(tmp_path: Path, value: int) -> None:
    write_pair(tmp_path, "ulm", "ulm_000000_000019", np.full((4, 4), value, np.uint8))
    with pytest.raises(DataError, match=rf"labelIds.png: label values \[{value}\] .*0\.\.33, 255"):
        build_dataset("cityscapes", tmp_path, "val").check()


def test_names_over_cities(tmp_path: Path) -> None:
    for city in ("ulm", "aachen"):
        write_pair(tmp_path, city, f"{city}_000001_000019", np.full((32, 32), 7, np.uint8))
    (tmp_path / "gtFine" / "val" / "ulm" / "ulm_000001_000019_gtFine_color.png").write_bytes(b"not read")
    dataset = build_dataset("cityscapes", tmp_path, "val")
    dataset.check()
    assert [dataset.name(index) for index in range(2)] == ["aachen_000001_000019", "ulm_000001_000019"]


def test_classes() -> None:
    names, palette = Cityscapes.classes.names, Cityscapes.classes.palette
    assert names[:3] == ("road", "sidewalk", "building")
    assert names[-2:] == ("motorcycle", "bicycle")
    assert palette[names.index("sky")] == (70, 130, 180)
    assert palette[names.index("car")] == (0, 0, 142)


@pytest.mark.parametrize("present", ["leftImg8bit", "gtFine"])
def test_half_a_download(tmp_path: Path, present: str) -> None:
    (tmp_path / present / "val").mkdir(parents=True)
    missing = {"leftImg8bit": "gtFine", "gtFine": "leftImg8bit"}[present]
    with pytest.raises(DataError, match=f"{missing}/val: no such folder"):
        build_dataset("cityscapes", tmp_path, "val")


def test_empty_split(tmp_path: Path) -> None:
    for folder in ("leftImg8bit", "gtFine"):
        (tmp_path / folder / "val").mkdir(parents=True)
    with pytest.raises(DataError, match=r"leftImg8bit/val: no \{city\}/\*_leftImg8bit\.png"):
        build_dataset("cityscapes", tmp_path, "val")
