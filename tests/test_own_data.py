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
from sparse_seg.config import check_training, load_config
from sparse_seg.data.class_file import read_class_file
from sparse_seg.data.dataset import read_image
from sparse_seg.data.reading import read_label
from tests.cli.test_video import properties
from tests.data.files import PALETTE, palette, png, sideways_photo

PAGE = (Path(__file__).parents[1] / "docs/own-data.md").read_text()
SHORT, LONG, SEQUENCES, CONFIG = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
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


def follow(commands: str) -> None:
    for line in commands.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "sparse-seg"
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
    pytest.importorskip("onnxruntime")
    follow(COMMANDS)
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
    assert Path("runs/own.onnx").stat().st_size > 10_000
    (predict,) = [line for line in COMMANDS.splitlines() if " predict " in line]
    Path("my-data/test/images/b/bad.jpg").write_bytes(b"\xff\xd8\xff no picture")
    Path("runs/pictures/b/1_ids.png").unlink()
    assert main(shlex.split(predict)[1:]) == 1
    assert "my-data/test/images/b/bad.jpg: truncated, corrupt or not an image" in capsys.readouterr().err
    assert Path("runs/pictures/b/1_ids.png").exists(), "the others are done"
    assert not list(Path("runs/pictures").rglob("bad*"))


def test_the_settings_for_frames_of_videos_are_read(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(SEQUENCES)
    data = load_config(tmp_path / "own.yaml").data
    assert data.train_on == ["train", "val"]
    assert data.withheld == ["drive7", "0016E5"]


def test_the_short_training_to_try_first_is_a_valid_one(tmp_path):
    (settings,) = re.findall(r"`--set (train\.iterations=\d+[^`]*)`", PAGE)
    (tmp_path / "own.yaml").write_text(CONFIG)
    config = load_config(tmp_path / "own.yaml", settings.split())
    assert config.train.iterations == 20
    check_training(config)


@pytest.mark.slow
def test_photos_videos_and_python(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_data("ids")
    config = CONFIG
    for number, smaller in SMALLER.items():
        config = config.replace(number, smaller)
    Path("own.yaml").write_text(config)
    assert main(["train", "own.yaml", "--work-dir", "runs/own"]) == 0
    image = read_image(Path("my-data/test/images/a/0.jpg"))
    Path("photo.jpg").write_bytes(sideways_photo(image))
    writer = cv2.VideoWriter("drive.avi", cv2.VideoWriter.fourcc(*"MJPG"), 10, image.shape[1::-1])
    for shift in range(3):
        writer.write(np.roll(image, 8 * shift, 1)[..., ::-1])
    writer.release()
    follow(MORE)
    for folder in ("photos", "averaged"):
        assert read_image(Path(f"runs/{folder}/photo_overlay.png")).shape == (320, 256, 3), "upright"
    for folder in ("video", "budget"):
        assert properties(Path(f"runs/{folder}/drive.mp4")) == (3, 10, (320, 256))
    assert len(list(Path("runs/video/drive_ids").iterdir())) == 3
    names: dict[str, object] = {}
    exec(PYTHON, names)
    segmentation = names["found"]
    assert isinstance(segmentation, sparse_seg.Segmentation)
    assert segmentation.names == tuple(KNOWN["names"])
    assert np.array_equal(segmentation.ids(), np.array(KNOWN["ids"])[segmentation.classes])
