"""The page before training: what it shows, what it calls odd, and faulty files."""

import html
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.cli.commands import done, fails


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """62 images of noise in three classes."""
    folder, rng = tmp_path_factory.mktemp("browse"), np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / f"data/{split}/{kind}").mkdir(parents=True)
        for number in range(60 if split == "train" else 2):
            ids = rng.permutation([0, 1, 2, 0, 1, 2]).reshape(2, 3).repeat(32, 0).repeat(32, 1)
            image = np.dstack([ids * 60 + 50] * 3).astype(np.uint8)
            write(folder, split, number, image, ids.astype(np.uint8))
    (folder / "data/classes.yaml").write_text("names: [sand, rock, 'a <b>', never]\n")
    return folder / "data"


@pytest.fixture
def config(data, tmp_path) -> Path:
    """Of a copy of them."""
    shutil.copytree(data, tmp_path / "data")
    config = tmp_path / "own.yaml"
    config.write_text(
        f"data: {{dataset: folder, root: {tmp_path / 'data'}, crop: [48, 48]}}\ntrain: {{batch_size: 4}}\n"
    )
    return config


def write(folder: Path, split: str, number: int, image: np.ndarray, ids: np.ndarray) -> None:
    assert cv2.imwrite(str(folder / f"data/{split}/images/{number:03d}.png"), image)
    assert cv2.imwrite(str(folder / f"data/{split}/labels/{number:03d}.png"), ids)


def test_a_page(config, tmp_path, capsys):
    out = tmp_path / "page.html"
    done("browse", config, "--out", out, "--count", "5")
    assert f"page: {out}" in capsys.readouterr().out
    page = out.read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == ["Splits", "Classes", "train: labels", "val: labels", "Augmentation"]
    assert page.count("<img") == 1 + 5 + 2 + 4
    assert "a &lt;b&gt;" in page
    assert "No training label holds never" in page
    assert "http" not in re.sub(r'src="[^"]*"', "", page)


def test_sequences_on_both_sides_are_told(config, tmp_path):
    for split, numbers in (("train", range(3)), ("val", (2, 3))):
        for number in numbers:
            for kind in ("images", "labels"):
                file = tmp_path / f"data/{split}/{kind}/{number if split == 'train' else number - 2:03d}.png"
                file.rename(file.with_name(f"drive{number}_000.png" if number else "drive3_001.png"))
    out = tmp_path / "page.html"
    done("browse", config, "--out", out)
    page = html.unescape(out.read_text())
    assert "drive2 (1 train, 1 validate), drive3 (1 train, 1 validate)." in page
    assert """--set 'data.withheld=["drive1"]'""" in page


def test_odd_frames(config, tmp_path):
    black, sand = np.zeros((64, 96, 3), np.uint8), np.zeros((64, 96), np.uint8)
    write(tmp_path, "train", 3, black, sand)
    ignored = np.full((64, 96), 255, np.uint8)
    ignored[:10, :50], ignored[:10, 50:] = 3, 1
    write(tmp_path, "train", 5, black + 90, ignored)
    small = np.tile(np.arange(40, dtype=np.uint8) % 3, (40, 1))
    write(tmp_path, "train", 7, np.full((40, 40, 3), 90, np.uint8), small)
    out = tmp_path / "page.html"
    done("browse", config, "--out", out)
    page = out.read_text()
    assert "3 frames look odd" in page
    assert "003: nearly all sand; 1 classes; very dark" in page
    assert "005: 84% ignored; holds the rare never" in page
    assert "007: 40x40 px, most are 64x96" in page


def test_faulty_files_are_listed(config, tmp_path, capsys):
    write(tmp_path, "train", 3, np.zeros((64, 96, 3), np.uint8), np.full((64, 96), 9, np.uint8))
    (tmp_path / "data/val/labels/001.png").unlink()
    out = tmp_path / "page.html"
    complaint = fails(capsys, "browse", config, "--out", out)
    assert "labels/003.png: label values [9]" in complaint
    assert f"faulty files in all: 2, listed in {out}" in complaint
    page = out.read_text()
    assert "2 faulty files: training will refuse them" in page
    assert "val/images/001.png: its label" in page
    assert "Augmentation" not in page
    for split in ("train", "val"):  # of nothing else
        labels = sorted((tmp_path / f"data/{split}/labels").iterdir())
        for label in labels:
            label.write_bytes(b"no picture")
        complaint = fails(capsys, "browse", config, "--out", out)
        assert "train/labels/000.png: truncated, corrupt or not an image" in complaint
    assert "62 faulty files: training will refuse them" in out.read_text()


@pytest.mark.timeout(60)
def test_16_bit_images_are_looked_at_and_said(config, tmp_path, caplog):
    """The files are read by threads while what libraries print is caught, which only one thread may do."""
    for split, count in (("train", 60), ("val", 2)):
        for number in range(count):
            image = np.full((64, 96, 3), 3000, np.uint16)
            assert cv2.imwrite(str(tmp_path / f"data/{split}/images/{number:03d}.png"), image)
    done("browse", config, "--out", tmp_path / "page.html", "--count", "2")
    assert len(caplog.messages) == 2
    assert "62 of 62 images have 16 bits per channel but no value above 4095" in caplog.messages[0]
