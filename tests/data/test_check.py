"""What `check` refuses or says of a split: nothing labelled, one class, train ids, bit depths, links."""

import logging
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from sparse_seg.data import build_dataset
from sparse_seg.data.cityscapes import CITYSCAPES_IDS
from sparse_seg.errors import DataError
from tests.data.files import png
from tests.data.test_reading import damaged_jpeg, jpeg, scene


def camvid(root: Path, labels: list[np.ndarray], split: str = "train") -> Path:
    for folder in (split, f"{split}annot"):
        (root / folder).mkdir()
    for index, label in enumerate(labels):
        image = scene(*label.shape)
        assert cv2.imwrite(str(root / split / f"{index}.png"), image)
        assert cv2.imwrite(str(root / f"{split}annot" / f"{index}.png"), label)
    return root


def cityscapes(root: Path, labels: list[np.ndarray]) -> Path:
    for index, label in enumerate(labels):
        stem = f"ulm_{index:06d}_000019"
        for folder, name, pixels in (
            ("leftImg8bit", f"{stem}_leftImg8bit.png", scene(*label.shape)),
            ("gtFine", f"{stem}_gtFine_labelIds.png", label),
        ):
            (root / folder / "val" / "ulm").mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(root / folder / "val" / "ulm" / name), pixels)
    return root


def blocks(values: list[int]) -> np.ndarray:
    """A label in which each value has a column."""
    return np.repeat(np.array(values, np.uint8)[None], 48, 0).repeat(-(-64 // len(values)), 1)


@pytest.mark.parametrize(
    ("values", "found"), [([0, 255], "0, 255"), ([0, 1], "0..1"), ([0], "0")], ids=["masks", "bits", "none"]
)
def test_labels_without_a_pixel_that_counts_are_refused(
    tmp_path: Path, values: list[int], found: str
) -> None:
    root = cityscapes(tmp_path, [blocks(values), blocks(values)])
    with pytest.raises(
        DataError, match=f"gtFine/val/ulm: no pixel of 2 labels .* values are {found}, all ig"
    ):
        build_dataset("cityscapes", root, "val").check()


def test_1_bit_masks_are_refused_as_what_they_are(tmp_path: Path) -> None:
    root = cityscapes(tmp_path, [blocks([7, 8])])
    (label,) = root.glob("gtFine/val/ulm/*")
    label.write_bytes(png(np.arange(48 * 64).reshape(48, 64) % 2, 1))
    with pytest.raises(DataError, match=r"values are 0\.\.1, all ignored"):
        build_dataset("cityscapes", root, "val").check()


def test_the_images_that_are_used_must_hold_a_label(tmp_path: Path) -> None:
    dataset = build_dataset("camvid", camvid(tmp_path, [blocks([11]), blocks([3, 4])]), "train")
    assert dataset.check().tolist() == [0, 0, 0, 48 * 32, 48 * 32, 0, 0, 0, 0, 0, 0]
    dataset.check(limit=2)
    with pytest.raises(DataError, match="no pixel of 1 labels belongs to a class"):
        dataset.check(limit=1)


def test_absent_classes_are_fine_and_one_class_alone_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build_dataset("camvid", camvid(tmp_path, [blocks([3]), blocks([3, 4])]), "train").check()
    assert not caplog.records
    build_dataset("camvid", camvid(tmp_path, [blocks([3, 11])], "val"), "val").check()
    assert caplog.messages == [
        f"warning: {tmp_path / 'valannot'}: all labelled pixels are of one class, 'Road'"
    ]


def test_train_ids_under_label_ids_names_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_dataset("cityscapes", cityscapes(tmp_path / "a", [blocks([*range(19), 255])]), "val").check()
    (message,) = caplog.messages
    assert "values in the labels are 0..18, 255, none from 19 to 33" in message
    assert "if they are train ids, other classes are learnt" in message
    caplog.clear()
    first, rest = blocks([7, 8]), blocks(list(CITYSCAPES_IDS.values()))
    build_dataset("cityscapes", cityscapes(tmp_path / "b", [first, rest]), "val").check()
    assert not caplog.records, "a frame without them is nothing"


def test_12_bit_pictures_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = camvid(tmp_path, [blocks([3, 4])] * 2)
    assert cv2.imwrite(str(root / "train" / "1.png"), scene().astype(np.uint16) << 4)
    build_dataset("camvid", root, "train").check()
    (message,) = caplog.messages
    assert "1 of 2 images have 16 bits per channel but no value above 4095, such as 1.png" in message


def test_a_damaged_jpeg_among_images_is_named(tmp_path: Path) -> None:
    root = camvid(tmp_path, [blocks([3, 4])] * 3)
    for index in range(3):
        (root / "train" / f"{index}.png").unlink()
        (root / "train" / f"{index}.jpg").write_bytes(damaged_jpeg() if index == 1 else jpeg())
    with pytest.raises(
        DataError, match=r"train/1\.jpg: the JPEG is damaged \([^)]*\); restore it .*original$"
    ):
        build_dataset("camvid", root, "train").check()


def test_the_median_frame_is_known_after_the_check(tmp_path: Path) -> None:
    sizes = [(300, 200), (48, 64), (64, 48), (64, 96), (200, 300)]
    data = build_dataset("camvid", camvid(tmp_path, [np.zeros(size, np.uint8) for size in sizes]), "train")
    assert data.frame_size is None
    data.check()
    assert data.frame_size == (64, 96), "by area, a frame that is there"


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    root = camvid(tmp_path, [blocks([3, 4])] * 3)
    for folder in ("train", "trainannot"):
        (root / folder / "1.png").unlink()
        (root / folder / "1.png").symlink_to(f"/nowhere/{folder}.png")
    with pytest.raises(DataError, match=r"train/1\.png: cannot be read \(it links to /nowhere/train\.png"):
        build_dataset("camvid", root, "train").check()


def test_a_city_that_links_nowhere_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = cityscapes(tmp_path, [blocks([7, 23])])
    for folder in ("leftImg8bit", "gtFine"):
        (root / folder / "val" / "bonn").symlink_to("/nowhere/bonn")
    assert len(build_dataset("cityscapes", root, "val")) == 1
    assert len(caplog.messages) == 2
    assert "leftImg8bit/val: 1 of 2 files are left out, such as bonn" in caplog.text


def test_a_city_behind_a_link_is_read(tmp_path: Path) -> None:
    root = cityscapes(tmp_path / "own", [blocks([7, 23])])
    for folder in ("leftImg8bit", "gtFine"):
        (root / folder / "val" / "ulm").rename(tmp_path / folder)
        (root / folder / "val" / "ulm").symlink_to(tmp_path / folder)
    build_dataset("cityscapes", root, "val").check()


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    root = camvid(tmp_path, [blocks([3, 4])])
    (root / "train" / "again").symlink_to(root / "train")
    with pytest.raises(DataError, match="again: a link to a folder that is read already"):
        build_dataset("camvid", root, "train")


def test_a_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = camvid(tmp_path, [blocks([3, 4])])
    (root / "train" / "more").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"train/more: cannot be read \(Permission denied\)"):
        build_dataset("camvid", root, "train")


def test_what_a_listing_leaves_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = camvid(tmp_path, [blocks([3, 4])])
    for name in ("2.bmp", ".hidden.png", "Thumbs.db"):
        (root / "train" / name).touch()
    with caplog.at_level(logging.WARNING):
        assert len(build_dataset("camvid", root, "train")) == 1
    (message,) = caplog.messages
    assert f"{root / 'train'}: 1 of 2 files are left out, such as 2.bmp; names end in .jpg, .png" in message
