"""Which frames train and validate: `data.train_on`, `data.withheld`."""

from pathlib import Path

import numpy as np
import pytest

from sparse_seg.config import DataConfig
from sparse_seg.data import open_split
from sparse_seg.errors import ConfigError, DataError
from tests.data.files import write

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
