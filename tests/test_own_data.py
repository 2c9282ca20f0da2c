"""docs/own-data.md, followed to the letter: its files, its commands, its Python. Only counts are smaller."""

import contextlib
import io
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


def write_data() -> None:
    """Pictures of three materials; labels as ids, as a palette and as colours, some pixels ignored."""
    rng = np.random.default_rng(0)
    shown = [(0, 0, 0)] * 256
    for value, rgb in zip(KNOWN["ids"], KNOWN["colours"], strict=True):
        shown[value] = tuple(rgb)
    for split, count in (("train", 4), ("val", 3), ("test", 2)):
        for number in range(count):
            train_ids = rng.choice(4, (4, 5), p=[0.4, 0.3, 0.2, 0.1]).repeat(64, 0).repeat(64, 1)
            ids = np.array([*KNOWN["ids"], 255], np.uint8)[train_ids]
            colour = np.array(shown, np.uint8)[ids]
            image = Path("my-data", split, "images", f"{'ab'[number % 2]}/{number}.jpg")
            image.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 40, colour.shape)
            cv2.imwrite(str(image), (colour // 2 + 60 + noise).astype(np.uint8)[..., ::-1])
            if split == "test":
                continue
            label = Path("my-data", split, "labels", f"{'ab'[number % 2]}/{number}.png")
            label.parent.mkdir(parents=True, exist_ok=True)
            if number % 3 == 1:
                label.write_bytes(png(ids, 8, PALETTE, palette(shown)))
            else:
                cv2.imwrite(str(label), ids if number % 3 == 0 else colour[..., ::-1])
    Path("my-data/classes.yaml").write_text(LONG)


def follow(commands: str) -> str:
    """What the commands print."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for line in commands.strip().splitlines():
            program, *arguments = shlex.split(line)
            assert program == "sparse-seg"
            assert main(arguments) == 0, line
    return printed.getvalue()


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> tuple[Path, str]:
    """The folder in which the page's commands ran, and what they printed."""
    pytest.importorskip("onnxruntime")
    folder, config = tmp_path_factory.mktemp("own"), CONFIG
    for number, smaller in SMALLER.items():
        assert number in config
        config = config.replace(number, smaller)
    with contextlib.chdir(folder):
        write_data()
        Path("own.yaml").write_text(config)
        return folder, follow(COMMANDS)


@pytest.mark.slow
def test_from_a_folder_to_an_exported_network(followed, monkeypatch, capsys):
    folder, text = followed
    monkeypatch.chdir(folder)
    assert "selective, confidence, f=0.2" in text
    assert "2 images segmented; pictures in runs/pictures" in text
    assert "wall" in Path("runs/own.html").read_text()
    assert set(np.unique(read_label(Path("runs/pictures/a/0_ids.png"))).tolist()) <= set(KNOWN["ids"])
    found = read_class_file("runs/pictures/classes.yaml")
    assert (list(found.classes.names), list(found.ids)) == (KNOWN["names"], KNOWN["ids"])
    assert len(json.loads(Path("runs/shares.json").read_text())["images"]) == 2
    assert Path("runs/own.onnx").stat().st_size > 10_000
    (predict,) = [line for line in COMMANDS.splitlines() if " predict " in line]
    bad = Path("my-data/test/images/b/bad.jpg")
    bad.write_bytes(b"\xff\xd8\xff no picture")
    Path("runs/pictures/b/1_ids.png").unlink()
    assert main(shlex.split(predict)[1:]) == 1
    bad.unlink()
    assert "my-data/test/images/b/bad.jpg: truncated, corrupt or not an image" in capsys.readouterr().err
    assert Path("runs/pictures/b/1_ids.png").exists(), "the others are done"
    assert not list(Path("runs/pictures").rglob("bad*"))


def test_names_alone_are_enough(tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_text(SHORT)
    found = read_class_file(tmp_path / "classes.yaml")
    assert (list(found.classes.names), found.ids) == (KNOWN["names"], (0, 1, 2))


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
def test_photos_videos_and_python(followed, monkeypatch):
    monkeypatch.chdir(followed[0])
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
