"""From foreign checkpoints, or the shipped weights, to pictures: the commands of the docs as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from sparse_seg.cli import main
from sparse_seg.data.class_file import read_class_file, read_classes
from sparse_seg.data.dataset import read_image
from sparse_seg.data.reading import read_label
from sparse_seg.data.scenes import write_scenes
from tests.conversion.cases import SMALL, randomise, state_of
from tests.conversion.networks import Head, ResNet, Smp
from tests.data.files import sideways_photo
from tests.peers import package

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONVERTING = (ROOT / "docs/converting.md").read_text()
LIGHT = ["model.width=0.125", "model.head_channels=16", "data.crop=[64,64]", "data.workers=0"]
LIGHT += ["train.iterations=1", "train.batch_size=2", "train.warmup_iterations=0", "train.amp=false"]


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder where the commands find what they name."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    street = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    cv2.imwrite("street.jpg", street)
    Path("photo.jpg").write_bytes(sideways_photo(street))


def write_foreign_files() -> None:
    """Those that docs/converting.md names, of narrow networks with random weights."""
    torch.save({"model_state": state_of("vainf deeplabv3")}, "best_deeplabv3_resnet101_cityscapes.pth")
    torch.save(state_of("torchvision deeplabv3"), "deeplabv3_resnet50_coco.pth")
    encoder = ResNet(50, 8, "smp", **SMALL)  # type: ignore[arg-type]
    binary = Smp(encoder, Head("deeplabv3", channels=6, classes=1))
    torch.save(randomise(binary).state_dict(), "smp_binary.pth")
    torch.save(randomise(ResNet(50, 32, width=8, classes=1000)).state_dict(), "resnet50.pth")


@pytest.mark.slow
def test_foreign_checkpoints_to_pictures(capsys: pytest.CaptureFixture) -> None:
    write_foreign_files()
    write_scenes("data/cityscapes", 4, (64, 96), val_fraction=0.5)
    block, _any_module = re.findall(r"```bash\n(.*?)```", CONVERTING, re.DOTALL)
    for line in block.strip().splitlines():
        python, tool, *arguments = shlex.split(line, comments=True)
        assert python == "python"
        assert (ROOT / tool).is_file()
        lighter = LIGHT if tool == "tools/train.py" else []
        assert main([Path(tool).stem, *arguments, *lighter]) == 0, line
    text = capsys.readouterr().out
    assert "DIFFERS" not in text
    assert "P1 holds" in text
    for folder, picture, shape in (
        ("pictures", "street", (80, 112)),
        ("photos", "photo", (112, 80)),
        ("binary", "photo", (112, 80)),
    ):
        for kind in ("overlay", "classes", "blocks"):
            assert read_image(Path(f"runs/{folder}/{picture}_{kind}.png")).shape == (*shape, 3)
        found = read_class_file(f"runs/{folder}/classes.yaml")
        assert set(np.unique(read_label(Path(f"runs/{folder}/{picture}_ids.png")))) <= set(found.ids)
    voc = read_classes("voc")
    assert read_class_file("runs/photos/classes.yaml").classes.names == voc.classes.names
    assert len(voc.classes.names) == 21
    assert read_class_file("runs/binary/classes.yaml").classes.names == ("background", "foreground")
    assert Path("runs/cityscapes_r50/best.safetensors").is_file()
    back = torch.load("back.pth", weights_only=True)
    source = state_of("vainf deeplabv3")
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in source.items())


def test_the_first_photo_with_the_weights_of_the_package() -> None:
    (command,) = re.findall(r"`sparse-seg (predict street-lite0 photo\.jpg [^`]*)`", README)
    assert main(shlex.split(command)) == 0
    assert read_image(Path("D/photo_overlay.png")).shape == (112, 80, 3)
    names = read_class_file("D/classes.yaml").classes.names
    assert {"Road", "Car", "Pedestrian"} <= set(names)


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_readmes_first_example_runs_as_it_stands() -> None:
    package("torchvision.models.segmentation")
    names: dict[str, Any] = {}
    exec(EXAMPLES[0], names)
    assert names["classes"].shape == (1, 256, 512)
    assert names["blocks"].shape == (1, 8, 16)
    assert names["logits"].shape == (1, 21, 256, 512)
    assert len(names["better"]) == 3


@pytest.mark.slow
def test_the_readmes_commands_for_a_file_of_weights() -> None:
    write_foreign_files()
    block = next(one for one in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "convert" in one)
    for line in block.strip().splitlines():
        program, *arguments = shlex.split(line)
        if program == "sparse-seg":
            assert main(arguments) == 0, line
        else:
            subprocess.run([sys.executable, ROOT / arguments[0], *arguments[1:]], check=True)
    assert read_image(Path("overlay.png")).shape == (112, 80, 3)
    assert read_image(Path("pictures/photo_overlay.png")).shape == (112, 80, 3)


@pytest.mark.slow
def test_the_readmes_second_example_runs() -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLES[1], names)
    assert names["found"].classes.shape == (80, 112)
    with torch.inference_mode():
        for run in ("model", "fast"):
            assert names[run](torch.randn(1, 3, 64, 64)).shape[2:] == (64, 64)
