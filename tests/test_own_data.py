"""docs/own-data.md, followed to the letter: its files, its commands, its Python. Only counts are smaller."""

import json
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

import sparse_seg
from sparse_seg.cli import main
from sparse_seg.data.class_file import read_class_file
from sparse_seg.data.dataset import read_image
from sparse_seg.data.formats import PALETTE
from sparse_seg.data.reading import read_label
from tests.data.files import palette, png

PAGE = (Path(__file__).parents[1] / "docs/own-data.md").read_text()
SHORT, LONG, CONFIG = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
COMMANDS, MORE = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
(PYTHON,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
KNOWN = yaml.safe_load(LONG)
SMALLER = {
    "iterations: 4000": "iterations: 2",
    "width: 0.5": "width: 0.125",
    "batch_size: 8": "batch_size: 2",
    "warmup_iterations: 100": "warmup_iterations: 1",
}


def write_data(kind: str) -> None:
    """Pictures of three materials; labels as ids, as a palette or as colours, some pixels ignored."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for number in range(count):
            train_ids = rng.choice([0, 1, 2, 255], (4, 5), p=[0.4, 0.3, 0.2, 0.1]).astype(np.uint8)
            train_ids = train_ids.repeat(64, 0).repeat(64, 1)
            colours = np.array([*KNOWN["colours"], [0, 0, 0]], np.uint8)
            colour = colours[np.where(train_ids == 255, 3, train_ids)]
            name = f"{'ab'[number % 2]}/{number}"
            image = Path("my-data", split, "images", f"{name}.jpg")
            image.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 40, colour.shape)
            cv2.imwrite(str(image), (colour // 2 + 60 + noise).astype(np.uint8)[..., ::-1])
            label = Path("my-data", split, "labels", f"{name}.png")
            if split == "test":
                continue
            label.parent.mkdir(parents=True, exist_ok=True)
            ids = np.array([*KNOWN["ids"], 255], np.uint8)[np.where(train_ids == 255, 3, train_ids)]
            if kind == "colours":
                cv2.imwrite(str(label), colour[..., ::-1])
            elif kind == "palette":
                shown = [(0, 0, 0)] * 256
                for value, rgb in zip(KNOWN["ids"], KNOWN["colours"], strict=True):
                    shown[value] = tuple(rgb)
                label.write_bytes(png(ids, 8, PALETTE, palette(shown)))
            else:
                cv2.imwrite(str(label), train_ids if kind == "names" else ids)
    Path("my-data/classes.yaml").write_text(SHORT if kind == "names" else LONG)


def follow(commands: str, leave_out: str = " ") -> None:
    for line in commands.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "sparse-seg"
        if arguments[0] != leave_out:
            assert main(arguments) == 0, line


@pytest.mark.parametrize(
    "kind",
    ["ids", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("names", "palette", "colours"))],
)
def test_from_a_folder_to_an_exported_network(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_data(kind)
    config = CONFIG
    for number, smaller in SMALLER.items():
        assert number in config
        config = config.replace(number, smaller)
    Path("own.yaml").write_text(config)
    if kind == "ids":
        pytest.importorskip("onnxruntime")
    follow(COMMANDS, " " if kind == "ids" else "export")
    text = capsys.readouterr().out
    assert "selective, confidence, f=0.2" in text
    assert "2 images segmented; pictures in runs/pictures" in text
    assert "wall" in Path("runs/own.html").read_text()
    values = set(np.unique(read_label(Path("runs/pictures/a/0_ids.png"))).tolist())
    own = [0, 1, 2] if kind == "names" else KNOWN["ids"]
    assert values <= set(own)
    found = read_class_file("runs/pictures/classes.yaml")
    assert (list(found.classes.names), list(found.ids)) == (KNOWN["names"], own)
    assert len(json.loads(Path("runs/shares.json").read_text())["images"]) == 2
    if kind == "ids":
        assert Path("runs/own.onnx").stat().st_size > 10_000


def test_photos_videos_and_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_data("ids")
    config = CONFIG
    for number, smaller in SMALLER.items():
        config = config.replace(number, smaller)
    Path("own.yaml").write_text(config)
    assert main(["train", "own.yaml", "--work-dir", "runs/own"]) == 0
    image = read_image(Path("my-data/test/images/a/0.jpg"))
    cv2.imwrite("photo.jpg", image[..., ::-1])
    writer = cv2.VideoWriter("drive.avi", cv2.VideoWriter.fourcc(*"MJPG"), 10, image.shape[1::-1])
    for shift in range(3):
        writer.write(np.roll(image, 8 * shift, 1)[..., ::-1])
    writer.release()
    follow(MORE)
    assert read_image(Path("runs/photos/photo_overlay.png")).shape == image.shape
    assert len(list(Path("runs/video/drive_ids").iterdir())) == 3
    names: dict[str, object] = {}
    exec(PYTHON, names)
    segmentation = names["found"]
    assert isinstance(segmentation, sparse_seg.Segmentation)
    assert segmentation.names == tuple(KNOWN["names"])
    assert np.array_equal(segmentation.ids(), np.array(KNOWN["ids"])[segmentation.classes])
