"""Own data: labels of ids, palettes and colours, classes.yaml, nested folders, and who reads which split."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from sparse_seg.config import DataConfig, load_config, num_classes
from sparse_seg.data import SegmentationDataset, build_dataset, dataset_classes, open_split
from sparse_seg.data.class_file import default_palette
from sparse_seg.errors import ConfigError, DataError
from tests.data.files import PALETTE, palette, png, scene, write

NAMES = ["ground", "wall", "plant"]
COLOURS = [[10, 20, 30], [200, 0, 0], [0, 200, 0]]
IDS = [3, 7, 9]
CLASSES = {"names": NAMES, "ids": IDS, "colours": COLOURS, "ignore_colours": [[0, 0, 0]]}
STORED = np.resize(np.array([3, 7, 9, 255], np.uint8), (40, 64))
TRAIN_IDS = np.resize(np.array([0, 1, 2, 255], np.uint8), (40, 64))
RGB = np.resize(np.array([*COLOURS, [0, 0, 0]], np.uint8), (40, 64, 3))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One image in a sub-folder; no label yet."""
    (tmp_path / "classes.yaml").write_text(yaml.safe_dump(CLASSES))
    (tmp_path / "train" / "labels" / "a").mkdir(parents=True)
    write(tmp_path / "train" / "images" / "a" / "x.jpg", scene(40, 64))
    return tmp_path


def label(root: Path, content: np.ndarray | bytes, name: str = "a/x.png") -> SegmentationDataset:
    if isinstance(content, np.ndarray) and content.ndim == 3:
        content = content[..., ::-1]
    write(root / "train" / "labels" / name, content)
    return build_dataset("folder", root, "train")


def test_ids_palettes_and_colours_say_the_same(root: Path) -> None:
    colours = [(0, 0, 0)] * 256
    for value, colour in zip(IDS, COLOURS, strict=True):
        colours[value] = (colour[0], colour[1], colour[2])
    opaque = np.dstack([RGB[..., ::-1], np.full(RGB.shape[:2], 255, np.uint8)])
    for content in (
        STORED,
        png(STORED, 8, PALETTE, palette(colours)),
        RGB,
        cv2.imencode(".png", opaque)[1].tobytes(),
    ):
        dataset = label(root, content)
        assert dataset.check().tolist() == [640, 640, 640]
        np.testing.assert_array_equal(dataset.load(0)[1], TRAIN_IDS)
    assert dataset.classes.names == tuple(NAMES)
    assert dataset.classes.palette == ((10, 20, 30), (200, 0, 0), (0, 200, 0))


def test_names_alone_are_enough(root: Path) -> None:
    (root / "classes.yaml").write_text("names: [ground, wall, plant]\n")
    dataset = label(root, png(np.resize([0, 1, 2], (40, 64)), 2, PALETTE, palette([(9, 9, 9)] * 4)))
    dataset.check()
    np.testing.assert_array_equal(dataset.load(0)[1], np.resize([0, 1, 2], (40, 64)))
    assert dataset.classes.palette == default_palette(3)


def test_masks_of_0_and_255(root: Path) -> None:
    (root / "classes.yaml").write_text("names: [background, foreground]\nids: [0, 255]\n")
    dataset = label(root, np.resize(np.array([0, 255], np.uint8), (40, 64)))
    assert dataset.check().tolist() == [1280, 1280]
    np.testing.assert_array_equal(dataset.load(0)[1], np.resize([0, 1], (40, 64)))


def test_nested_folders_keep_equal_stems_apart(root: Path) -> None:
    write(root / "train" / "images" / "b" / "x.PNG", scene(40, 64))
    label(root, STORED)
    dataset = label(root, np.full((40, 64), 7, np.uint8), "b/x.PNG")
    dataset.check()
    assert [dataset.name(index) for index in range(2)] == ["a/x", "b/x"]
    assert (dataset.load(1)[1] == 1).all()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            np.resize(np.array([3, 8], np.uint8), (40, 64)),
            r"label values \[8\] \(\d+ px\) are not .* 3, 7, 9, 255; fix the file or add them to ids",
        ),
        (np.arange(7680, dtype=np.uint8).reshape(40, 64, 3), r".*so many are of smoothed edges"),
        (np.full((40, 64, 3), 77, np.uint8), r"colours \[\[77, 77, 77\]\] \(2560 px\) are not in .*classes"),
        (
            png(np.full((40, 64), 7), 8, PALETTE, palette([(10, 20, 30)] * 256)),
            r"index 7 has the colour \[10, 20, 30\], which .*classes\.yaml gives the id 3",
        ),
    ],
    ids=["value", "colours", "colour", "palette"],
)
def test_labels_are_checked_against_the_classes(root: Path, content, fault: str) -> None:
    with pytest.raises(DataError, match=rf"labels/a/x\.png: {fault}") as caught:
        label(root, content).check()
    assert "\n" not in str(caught.value)


def test_ids_three_times_are_read_where_that_is_said(root: Path) -> None:
    """Labels saved as RGB, red, green and blue being the id."""
    dataset = label(root, np.dstack([STORED] * 3))
    with pytest.raises(DataError, match=r"colours \[\[3, 3, 3\], .* are not in .*classes\.yaml"):
        dataset.check()
    known = {"names": NAMES, "ids": IDS}
    (root / "classes.yaml").write_text(yaml.safe_dump(known))
    with pytest.raises(DataError, match=r"blue are the same, read them as ids: add rgb_ids: true"):
        build_dataset("folder", root, "train").check()
    (root / "classes.yaml").write_text(yaml.safe_dump(known | {"rgb_ids": True}))
    dataset = build_dataset("folder", root, "train")
    assert dataset.check().tolist() == [640, 640, 640]
    np.testing.assert_array_equal(dataset.load(0)[1], TRAIN_IDS)
    with pytest.raises(DataError, match=r"the label holds colours, and .*classes\.yaml has none; add"):
        label(root, RGB).check()
    (root / "classes.yaml").write_text(yaml.safe_dump(CLASSES | {"rgb_ids": True}))
    with pytest.raises(ConfigError, match=r"rgb_ids is True; give true or false, true without colours only"):
        build_dataset("folder", root, "train")


def test_names_in_other_forms_of_unicode_are_pairs(root: Path) -> None:
    """macOS stores an accent as a character of its own."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    (root / "train/images/a/x.jpg").rename(root / f"train/images/a/{composed}.jpg")
    dataset = label(root, STORED, f"a/{apart}.png")
    assert dataset.check().tolist() == [640, 640, 640]
    assert dataset.samples[0][1].name == f"{apart}.png"
    write(root / f"train/images/a/{apart}.jpg", scene(40, 64))
    with pytest.raises(DataError, match="has the same stem, in another form of Unicode; keep one of the two"):
        build_dataset("folder", root, "train")


def test_a_root_that_is_not_there_is_said_first(tmp_path: Path) -> None:
    for ask in (
        lambda: build_dataset("folder", tmp_path / "no", "train"),
        lambda: dataset_classes("folder", "no"),
    ):
        with pytest.raises(DataError, match=r"no: no such folder; set data\.root to the dataset's folder"):
            ask()


def test_a_split_without_labels_is_for_prediction(root: Path) -> None:
    for file in (root / "train" / "labels" / "a", root / "train" / "labels"):
        file.rmdir()
    dataset = build_dataset("folder", root, "train")
    assert len(dataset) == 1
    with pytest.raises(DataError, match="train/labels: no such folder; a split without labels can be pred"):
        dataset.check()


def test_pairs_that_are_none(root: Path) -> None:
    with pytest.raises(DataError, match=r"a/x\.jpg: its label .*labels/a/x\.png is missing"):
        build_dataset("folder", root, "train").check()
    label(root, STORED)
    with pytest.raises(DataError, match=r"labels/a/y\.png: no image belongs to this label"):
        label(root, STORED, "a/y.png").check()
    write(root / "train" / "images" / "a" / "x.png", scene(40, 64))
    with pytest.raises(DataError, match="has the same stem"):
        build_dataset("folder", root, "train")
    missing = r"trian/images: no such folder; check the dataset's root and split; did you mean 'train'\?"
    with pytest.raises(DataError, match=missing):
        build_dataset("folder", root, "trian")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, r"does not exist; write it, with a line such as names"),
        ("names: [a", "is not valid YAML"),
        ("names: [a, b]\nnames: [c, d]", "is given twice"),
        ("colors: []\nnames: [a, b]", "unknown key 'colors'; did you mean 'colours'"),
        ("ids: [1, 2]", "names is None; it must be a list of texts"),
        ("names: [yes, no]", r"names is \[True, False\]; it must be a list of texts"),
        ("names: [a]", "names has 1 classes; give 2 to 254"),
        ("names: [a, a]", "names: 'a' stands twice"),
        ("names: [a, b]\nids: [1]", "ids has 1 values for 2 names"),
        ("names: [a, b]\nids: [1, 256]", r"ids is \[1, 256\]; it must be a list of whole numbers"),
        ("names: [a, b]\nids: [1, 1]", "ids and ignore: 1 stands twice"),
        ("names: [a, b]\nids: [1, 255]\nignore: [255]", "ids and ignore: 255 stands twice"),
        ("names: [a, b]\nids: [true, 2]", "it must be a list of whole numbers"),
        ("names: [a, b]\ncolours: [[1, 2, 3], [1, 2]]", r"it must be a list of \[r, g, b\]"),
        ("names: [a, b]\ncolours: [[1, 2, 3], [1, 2, 3]]", r"\[1, 2, 3\] stands twice"),
        ("names: [a, b]\ncolours: [[1, 2, 3]]", "colours has 1 values for 2 names"),
        ("names: [a, b]\ncolours: 7", "colours is 7; it must be a list of"),
        ("names: [a, b]\nignore: []\nignore_colours: [[0, 0, 0]]", "ignore_colours needs a value in ignore"),
    ],
)
def test_a_wrong_classes_file_is_named(root: Path, content: str | None, fault: str) -> None:
    file = root / "classes.yaml"
    file.unlink()
    if content is not None:
        file.write_text(content)
    for read in (
        lambda: dataset_classes("folder", root),
        lambda: build_dataset("folder", root, "train"),
    ):
        with pytest.raises(ConfigError, match=fault) as caught:
            read()
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_config_gets_the_classes_of_the_file(root: Path, tmp_path: Path) -> None:
    config = tmp_path / "own.yaml"
    config.write_text(f"data: {{dataset: folder, root: {root}}}\n")
    assert num_classes(load_config(config)) == 3
    with pytest.raises(ConfigError, match=r"class_weights has 2 values for 3 classes"):
        load_config(config, ["train.loss.class_weights=[1, 2]"])


TRAIN, VAL = ("a1_0.png", "a1_1.png", "b2_0.png", "c3-0.png"), ("a1_2.png", "d_0.png")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of frames of three drives; `d` has no number, so it need not be one."""
    for split, names in (("train", TRAIN), ("val", VAL)):
        for number, name in enumerate(names):
            write(tmp_path / split / "images" / name, np.full((40, 40, 3), number, np.uint8))
            write(tmp_path / split / "labels" / name, np.full((40, 40), number % 2, np.uint8))
    (tmp_path / "classes.yaml").write_text("names: [road, sky]\n")
    return tmp_path


def names(root: Path, split: str, **settings: object) -> list[str]:
    dataset = open_split(DataConfig("folder", str(root), **settings), split)  # type: ignore[arg-type]
    dataset.check()
    assert len(dataset) == len(set(dataset.files()) - {root / "classes.yaml"}) // 2
    return [dataset.name(index) for index in range(len(dataset))]


def test_splits_of_training_join_and_sequences_are_withheld(own: Path) -> None:
    assert names(own, "train") == ["a1_0", "a1_1", "b2_0", "c3-0"]
    both = {"train_on": ["train", "val"]}
    assert names(own, "train", **both) == ["a1_0", "a1_1", "b2_0", "c3-0", "a1_2", "d_0"]
    assert names(own, "val", **both) == ["a1_2", "d_0"]
    both["withheld"] = ["a1", "d_"]
    assert names(own, "train", **both) == ["b2_0", "c3-0"]
    assert names(own, "val", **both) == ["a1_0", "a1_1", "a1_2", "d_0"]
    assert names(own, "val", withheld=["c3"]) == ["c3-0"]
    dataset = open_split(DataConfig("folder", str(own), **both), "val")  # type: ignore[arg-type]
    assert [int(dataset.load(index)[0].max()) for index in range(4)] == [0, 1, 0, 1]
    assert [dataset.sequence(index) for index in range(4)] == ["a1", "a1", "a1", None]


def test_impossible_splits_are_told(own: Path) -> None:
    with pytest.raises(ConfigError, match=r"begins with 'a2'; choose one of a1, b2, c3"):
        names(own, "train", withheld=["a2"])
    with pytest.raises(ConfigError, match="leaves no frame to train"):
        names(own, "train", withheld=["a", "b", "c"])
    with pytest.raises(DataError, match="trian"):
        names(own, "train", train_on=["trian"])
