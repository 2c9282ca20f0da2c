"""What `check` and the constructors say about faulty folders, on CamVid's layout."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from sparse_seg.data import DATASETS, ClassList, build_dataset, dataset_classes
from sparse_seg.errors import ConfigError, DataError


def write(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), pixels)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three sound pairs."""
    rng = np.random.default_rng(0)
    for stem in "abc":
        write(tmp_path / "train" / f"{stem}.jpg", rng.integers(0, 256, (36, 48, 3), np.uint8))
        write(tmp_path / "trainannot" / f"{stem}.png", rng.integers(0, 12, (36, 48), np.uint8))
    return tmp_path


def check_fails(root: Path, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        build_dataset("camvid", root, "train").check()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_sound_folder_passes(root: Path) -> None:
    dataset = build_dataset("camvid", root, "train")
    dataset.check()
    assert len(dataset) == 3
    assert [dataset.name(index) for index in range(3)] == ["a", "b", "c"]
    image, label = dataset[1]
    assert image.shape == (36, 48, 3)
    assert image.dtype == label.dtype == np.uint8
    assert label.shape == (36, 48)


def test_images_are_rgb(root: Path) -> None:
    red = np.zeros((36, 48, 3), np.uint8)
    red[..., 2] = 255  # OpenCV writes BGR
    write(root / "train" / "d.png", red)
    write(root / "trainannot" / "d.png", np.zeros((36, 48), np.uint8))
    image, _ = build_dataset("camvid", root, "train").load(3)
    assert (image == (255, 0, 0)).all()


def test_image_without_label(root: Path) -> None:
    (root / "trainannot" / "b.png").unlink()
    check_fails(root, "b.jpg", "trainannot/b.png is missing", "remove the image")


def test_label_without_image(root: Path) -> None:
    (root / "train" / "b.jpg").unlink()
    check_fails(root, "trainannot/b.png", "no image belongs to this label")


def test_sizes_differ(root: Path) -> None:
    write(root / "trainannot" / "b.png", np.zeros((36, 40), np.uint8))
    check_fails(root, "trainannot/b.png", "36x40", "36x48", "nearest neighbour")


def test_image_too_small_for_a_network(root: Path) -> None:
    write(root / "train" / "b.jpg", np.zeros((31, 48, 3), np.uint8))
    write(root / "trainannot" / "b.png", np.zeros((31, 48), np.uint8))
    check_fails(root, "train/b.jpg", "the image is 31x48", "32x32 or more")


def test_unknown_label_value(root: Path) -> None:
    write(root / "trainannot" / "b.png", np.full((36, 48), 12, np.uint8))
    check_fails(root, "trainannot/b.png", "[12]", "0..11")


def test_label_of_colours(root: Path) -> None:
    write(root / "trainannot" / "b.png", np.zeros((36, 48, 3), np.uint8))
    check_fails(root, "trainannot/b.png", "3-channel uint8", "single-channel")


def test_label_of_16_bits(root: Path) -> None:
    write(root / "trainannot" / "b.png", np.zeros((36, 48), np.uint16))
    check_fails(root, "trainannot/b.png", "1-channel uint16", "8-bit")


@pytest.mark.parametrize("name", ["train/b.jpg", "trainannot/b.png"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.97])
def test_truncated_file(root: Path, name: str, kept: float) -> None:
    data = (root / name).read_bytes()
    (root / name).write_bytes(data[: int(len(data) * kept)])
    check_fails(root, name, "truncated, corrupt or not an image")


@pytest.mark.parametrize("name", ["train/b.jpg", "trainannot/b.png"])
def test_not_an_image(root: Path, name: str) -> None:
    (root / name).write_text("not an image")
    check_fails(root, name, "truncated, corrupt or not an image")


def test_unreadable_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    check_fails(root, "train/a.jpg", "Permission denied", "faulty files in all: 3")


def test_damage_inside_a_png(root: Path) -> None:
    file = root / "trainannot" / "b.png"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    check_fails(root, "trainannot/b.png", "truncated, corrupt or not an image")


def test_further_faults_are_counted(root: Path) -> None:
    (root / "trainannot" / "a.png").unlink()
    write(root / "trainannot" / "c.png", np.full((36, 48), 77, np.uint8))
    check_fails(root, "a.jpg", "(faulty files in all: 2)")


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "no" / "train"))):
        build_dataset("camvid", tmp_path / "no", "train")


def test_missing_split(root: Path) -> None:
    with pytest.raises(DataError, match="no such folder; check the dataset's root and split"):
        build_dataset("camvid", root, "val")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("camvids", "did you mean 'camvid'"), ("kitti", "cityscapes, camvid, scenes, voc, ade20k, folder")],
)
def test_unknown_dataset(root: Path, name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        build_dataset(name, root, "train")


def test_classes_are_known_without_files() -> None:
    counts = {"cityscapes": 19, "camvid": 11, "scenes": 19, "voc": 21, "ade20k": 150}
    assert {name: len(dataset_classes(name, "nowhere")) for name in counts} == counts
    assert {*counts, "folder"} == set(DATASETS)


def test_class_list_needs_a_colour_for_each_name() -> None:
    with pytest.raises(ValueError, match="2 class names but 1 colours"):
        ClassList(("a", "b"), ((0, 0, 0),))


def test_pixels_stay_as_stored_whatever_exif_says(root: Path) -> None:
    """A viewer would turn this image by a quarter; its label is not turned, so it must not be either."""
    file = root / "train" / "b.jpg"
    orientation = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    segment = b"Exif\0\0" + orientation
    jpeg = file.read_bytes()
    before, _ = build_dataset("camvid", root, "train").load(1)
    file.write_bytes(jpeg[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + jpeg[2:])
    turned = cv2.imread(str(file))
    assert turned is not None
    assert turned.shape == (48, 36, 3)
    after, _ = build_dataset("camvid", root, "train").load(1)
    np.testing.assert_array_equal(after, before)
