"""The datasets' classes, ids and folders, and what their constructors and `check` say about faulty ones."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparse_seg.data import DATASETS, build_dataset, dataset_classes
from sparse_seg.data.class_file import default_palette
from sparse_seg.errors import ConfigError, DataError
from tests.data.files import PALETTE, camvid, damaged_jpeg, jpeg, palette, png, scene, write
from tests.shared import SHARED, needs_shared

_IGNORED = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30, 255)
_CITYSCAPES = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
    27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip  # typed from cityscapesScripts' documentation


def blocks(*values: int) -> np.ndarray:
    """A label `[48, 64 or more]` in which each value has columns of its own."""
    return np.repeat(np.array(values, np.uint8)[None], 48, 0).repeat(-(-64 // len(values)), 1)


def cityscapes(root: Path, *labels: np.ndarray, city: str = "ulm") -> Path:
    for index, label in enumerate(labels):
        stem = f"val/{city}/{city}_{index:06d}_000019"
        write(root / f"leftImg8bit/{stem}_leftImg8bit.png", scene(*label.shape))
        write(root / f"gtFine/{stem}_gtFine_labelIds.png", label)
    return root


@pytest.mark.parametrize(
    ("name", "image", "label", "values", "train_ids"),
    [
        ("camvid", "val/a.png", "valannot/a.png", [*range(12)], [*range(11), 255]),
        (
            *("cityscapes", "leftImg8bit/val/ulm/ulm_0_1_leftImg8bit.png"),
            "gtFine/val/ulm/ulm_0_1_gtFine_labelIds.png",
            *([*_CITYSCAPES, *_IGNORED], [*_CITYSCAPES.values(), *[255] * len(_IGNORED)]),
        ),
        (
            *("ade20k", "images/validation/ADE_1.jpg", "annotations/validation/ADE_1.png"),
            *([0, 1, 3, 150], [255, 0, 2, 149]),
        ),
        (
            *("voc", "JPEGImages/2007_000033.jpg", "SegmentationClass/2007_000033.png"),
            *([0, 15, 20, 255], [0, 15, 20, 255]),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" not in value else "",
)
def test_a_dataset_has_its_folders_and_ids(tmp_path: Path, name, image, label, values, train_ids):
    stored = blocks(*values)
    write(tmp_path / image, scene(*stored.shape))
    write(tmp_path / label, png(stored, 8, PALETTE, palette(list(default_palette(256)))))
    write(tmp_path / "ImageSets/Segmentation/val.txt", "2007_000033\n")
    dataset = build_dataset(name, tmp_path, "val")
    expected = blocks(*train_ids)
    np.testing.assert_array_equal(dataset.load(0)[1], expected)
    counts = np.bincount(expected.ravel(), minlength=256)[: len(dataset.classes)]
    assert dataset.check().tolist() == counts.tolist()
    assert dataset[0][0].shape == (*stored.shape, 3)
    assert dataset.name(0) in image


def test_classes_are_known_without_files() -> None:
    known = {name: dataset_classes(name, "nowhere").classes for name in DATASETS if name != "folder"}
    counts = {"cityscapes": 19, "camvid": 11, "scenes": 19, "voc": 21, "ade20k": 150}
    assert {name: len(set(classes.names)) for name, classes in known.items()} == counts
    for name, index, class_name, colour in (
        ("cityscapes", 10, "sky", (70, 130, 180)),
        ("cityscapes", 13, "car", (0, 0, 142)),
        ("cityscapes", 18, "bicycle", (119, 11, 32)),
        ("camvid", 3, "Road", (128, 64, 128)),
        ("voc", 15, "person", (192, 128, 128)),
        ("voc", 20, "tvmonitor", (0, 64, 128)),
        ("ade20k", 44, "chest of drawers", default_palette(46)[45]),
        ("ade20k", 149, "flag", default_palette(151)[150]),
    ):
        assert (known[name].names[index], known[name].palette[index]) == (class_name, colour)
    assert len(set(default_palette(256))) == 256
    for name, hint in (("camvids", "did you mean 'camvid'"), ("kitti", "cityscapes, camvid, scenes, voc, a")):
        with pytest.raises(ConfigError, match=hint):
            build_dataset(name, "nowhere", "train")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three sound pairs: `a` and `b`, and `c` whose image is a JPEG."""
    for stem in "abc":
        pixels = scene(36, 48)
        write(tmp_path / f"train/{stem}.{'jpg' if stem == 'c' else 'png'}", pixels)
        write(tmp_path / f"trainannot/{stem}.png", np.resize(np.arange(12, dtype=np.uint8), (36, 48)))
    return tmp_path


def test_a_sound_split_is_read_as_rgb_in_order(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = build_dataset("camvid", root, "train")
    dataset.check()
    assert [dataset.name(index) for index in range(len(dataset))] == ["a", "b", "c"]
    image, label = dataset[1]
    np.testing.assert_array_equal(image, scene(36, 48)[..., ::-1])
    assert (label.shape, label.dtype) == ((36, 48), np.uint8)
    assert not caplog.records


_GREY = np.zeros((36, 48), np.uint8)
_BROKEN = r"truncated, corrupt or not an image"


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("trainannot/b.png", None, r"train/b\.png: its label .*annot/b\.png is missing; .*remove the im"),
        ("train/b.png", None, r"trainannot/b\.png: no image belongs to this label"),
        ("trainannot/b.png", _GREY[:, 8:], r"annot/b\.png: .* 36x40 .* 36x48; .* nearest neighbour"),
        ("trainannot/b.png", _GREY + 12, r"label values \[12\] \(1728 px\) .* 0\.\.11; fix"),
        ("trainannot/b.png", np.dstack([_GREY] * 3), r"the label is 3-channel uint8; .*single-channel"),
        ("trainannot/b.png", _GREY.astype(np.uint16), r"b\.png: the label is 1-channel uint16; .*8-bit"),
        ("trainannot/b.png", b"not an image", rf"annot/b\.png: {_BROKEN}"),
        ("train/b.png", Path("/nowhere/b.png"), r"b\.png: cannot be read \(it links to /nowhere/b\.png"),
        ("train/c.jpg", damaged_jpeg(36, 48), r"c\.jpg: the JPEG is damaged \([^)]*\); restore it .*al$"),
        ("trainannot/b.png", 0.5, rf"annot/b\.png: {_BROKEN}"),
        ("train/b.png", 0.0, rf"train/b\.png: {_BROKEN}"),
        ("train/c.jpg", 0.97, rf"train/c\.jpg: {_BROKEN}"),
    ],
)
def test_a_faulty_file_is_one_line(root: Path, name: str, content: object, fault: str) -> None:
    """A share is what is left of the file."""
    whole = (root / name).read_bytes()
    (root / name).unlink()
    if isinstance(content, Path):
        (root / name).symlink_to(content)
    elif isinstance(content, float):
        write(root / name, whole[: int(content * len(whole))])
    elif isinstance(content, np.ndarray | bytes):
        write(root / name, content)
    with pytest.raises(DataError, match=fault) as caught:
        build_dataset("camvid", root, "train").check()
    assert "\n" not in str(caught.value)
    write(root / "trainannot/a.png", _GREY + 77)
    with pytest.raises(DataError, match=r"\(faulty files in all: 2; sparse-seg browse lists them\)"):
        build_dataset("camvid", root, "train").check()


def test_images_too_small_and_files_that_may_not_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    camvid(root / "small", blocks(3)[:31])
    with pytest.raises(DataError, match=r"train/0\.png: the image is 31x64; use images of 32x32 or more"):
        build_dataset("camvid", root / "small", "train").check()

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"train/a\.png: cannot be read \(Permission denied.* in all: 3;"):
        build_dataset("camvid", root, "train").check()


def test_folders_that_are_missing_or_empty(root: Path) -> None:
    for split, folder in (("val", root), ("train", root / "no")):
        missing = re.escape(str(folder / split)) + ".*no such folder; check the dataset's root and split"
        with pytest.raises(DataError, match=missing):
            build_dataset("camvid", folder, split)
    write(root / "train/a.jpg", jpeg())
    with pytest.raises(DataError, match=r"a\.png: a\.jpg has the same stem|a\.jpg: a\.png has the same stem"):
        build_dataset("camvid", root, "train")
    for empty in ("empty", "emptyannot", "leftImg8bit/val", "half/gtFine/val"):
        (root / empty).mkdir(parents=True)
    for name, folder, split, fault in (
        ("camvid", root, "empty", r"empty: no \.jpg or \.png image"),
        ("cityscapes", root, "val", "gtFine/val: no such folder"),
        ("cityscapes", root / "half", "val", "leftImg8bit/val: no such folder"),
    ):
        with pytest.raises(DataError, match=fault):
            build_dataset(name, folder, split)
    (root / "gtFine/val").mkdir(parents=True)
    with pytest.raises(DataError, match=r"leftImg8bit/val: no _leftImg8bit\.png image in it; put the split"):
        build_dataset("cityscapes", root, "val")


@pytest.mark.parametrize(
    ("values", "found"), [((0, 255), "0, 255"), ((0, 1), "0..1"), ((0,), "0")], ids=["masks", "bits", "none"]
)
def test_labels_without_a_pixel_that_counts_are_refused(tmp_path: Path, values, found: str) -> None:
    root = cityscapes(tmp_path, blocks(*values))
    if values == (0, 1):
        write(next(root.glob("gtFine/val/ulm/*")), png(blocks(0, 1), 1))
    message = f"gtFine/val/ulm: no pixel of 1 labels .* values are {re.escape(found)}, all ignored"
    with pytest.raises(DataError, match=message):
        build_dataset("cityscapes", root, "val").check()


def test_the_images_that_are_used_must_hold_a_label_and_their_median_is_known(tmp_path: Path) -> None:
    sizes = [(300, 200), (48, 64), (64, 48), (64, 96), (200, 300)]
    labels = [np.full(size, 11 if index == 0 else 3, np.uint8) for index, size in enumerate(sizes)]
    dataset = build_dataset("camvid", camvid(tmp_path, *labels), "train")
    assert dataset.frame_size is None
    assert dataset.check(limit=2).nonzero()[0].tolist() == [3]
    assert dataset.frame_size == (64, 96), "by area, a frame that is there"
    with pytest.raises(DataError, match="no pixel of 1 labels belongs to a class"):
        dataset.check(limit=1)


def test_odd_labels_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said(dataset) -> str:
        caplog.clear()
        dataset.check()
        return "".join(caplog.messages)

    root = camvid(tmp_path, blocks(3), blocks(3, 4))
    assert not said(build_dataset("camvid", root, "train")), "absent classes are fine"
    camvid(root, blocks(3, 11), split="val")
    one = f"warning: {root / 'valannot'}: all labelled pixels are of one class, 'Road'"
    assert said(build_dataset("camvid", root, "val")) == f"{one}; the values 11 are ignored"
    message = said(build_dataset("cityscapes", cityscapes(tmp_path / "a", blocks(*range(19), 255)), "val"))
    assert "values in the labels are 0..18, 255, none from 19 to 33" in message
    assert "if they are train ids, other classes are learnt" in message
    own = cityscapes(tmp_path / "b", blocks(7, 8), blocks(*_CITYSCAPES))
    assert not said(build_dataset("cityscapes", own, "val")), "a frame without them is nothing"
    write(next((own / "gtFine/val/ulm").iterdir()), blocks(7, 34, 200))
    with pytest.raises(DataError, match=r"labelIds\.png: label values \[34, 200\] .*0\.\.33, 255"):
        build_dataset("cityscapes", own, "val").check()


def test_cities_behind_links_and_in_another_form_of_unicode(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    composed, apart = "n\u00fcrnberg", "nu\u0308rnberg"
    root = cityscapes(cityscapes(tmp_path / "own", blocks(7, 23), city=composed), blocks(7, 23))
    write(root / "gtFine/val/ulm/ulm_000000_000019_gtFine_color.png", b"not read")
    (root / f"gtFine/val/{composed}").rename(root / f"gtFine/val/{apart}")
    for folder in ("leftImg8bit", "gtFine"):
        (root / folder / "val/ulm").rename(tmp_path / folder)
        (root / folder / "val/ulm").symlink_to(tmp_path / folder)
    dataset = build_dataset("cityscapes", root, "val")
    dataset.check()
    assert [dataset.name(index) for index in range(2)] == [f"{composed}_000000_000019", "ulm_000000_000019"]
    assert dataset.samples[0][1].parent.name == apart
    assert not caplog.records
    for folder in ("leftImg8bit", "gtFine"):
        (root / folder / "val/bonn").symlink_to("/nowhere/bonn")
    assert len(build_dataset("cityscapes", root, "val")) == 2
    assert len(caplog.messages) == 2
    assert "leftImg8bit/val: 1 of 3 files are left out, such as bonn" in caplog.text


def test_folders_that_cannot_be_listed_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "train/again").symlink_to(root / "train")
    with pytest.raises(DataError, match="again: a link to a folder that is read already"):
        build_dataset("camvid", root, "train")
    (root / "train/again").unlink()
    (root / "train/more").mkdir()
    scan: Callable[..., object] = os.scandir

    def refuse(path):
        if str(path).endswith("more"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"train/more: cannot be read \(Permission denied\)"):
        build_dataset("camvid", root, "train")


def test_what_a_listing_leaves_out_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("2.bmp", ".hidden.png", "Thumbs.db"):
        (root / "train" / name).touch()
    with caplog.at_level(logging.WARNING):
        assert len(build_dataset("camvid", root, "train")) == 3
    (message,) = caplog.messages
    assert f"{root / 'train'}: 1 of 4 files are left out, such as 2.bmp; names end in .jpg, .png" in message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_voc_list_as_editors_save_it(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "ImageSets/Segmentation/val.txt"
    write(file, "2007_000033\r\n2007_caf\u00e9\r\n".encode(encoding))
    apart = tmp_path / "JPEGImages/2007_cafe\u0301.jpg"
    write(apart, b"")
    dataset = build_dataset("voc", tmp_path, "val")
    assert [image.name for image, _ in dataset.samples] == ["2007_000033.jpg", apart.name]
    with pytest.raises(DataError, match=r"2007_000033\.jpg: its label .* is missing"):
        dataset.check()
    for content, fault in (
        (b"2007\xff\xfe\xfa", r"val\.txt: is no text in UTF-8 or UTF-16; save it as UTF-8"),
        (b"", r"val\.txt: names no image"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=fault):
            build_dataset("voc", tmp_path, "val")
    with pytest.raises(DataError, match=r"Segmentation/train\.txt: no such list"):
        build_dataset("voc", tmp_path, "train")


@pytest.mark.slow
@needs_shared("data/camvid")
@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101)])
def test_real_camvid_is_sound(split: str, count: int) -> None:
    dataset = build_dataset("camvid", SHARED / "data/camvid", split)
    dataset.check()
    assert len(dataset) == count
    image, label = dataset.load(0)
    assert (image.shape, label.shape) == ((360, 480, 3), (360, 480))
    sky, road = (np.nonzero(label == dataset.classes.names.index(name))[0].mean() for name in ("Sky", "Road"))
    assert sky < road
