"""Own data and the network that a training made of it, once for all tests of commands."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from sparse_seg import SelectiveNetwork, load_model
from tests.cli.commands import done

NAMES, IDS = ["ground", "wall", "Straße"], [3, 7, 9]


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, `own.yaml` upon `base.yaml`, and the `run` of two iterations."""
    folder, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for split, name in itertools.product(("train", "val"), "ab"):
        ids = np.repeat(rng.choice(IDS, (4, 6)), 16, 0).repeat(16, 1).astype(np.uint8)
        for kind, pixels in (("images", np.dstack([ids * 25] * 3)), ("labels", ids)):
            file = folder / "data" / split / kind / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(file), pixels)
    (folder / "data/classes.yaml").write_text(yaml.safe_dump({"names": NAMES, "ids": IDS}))
    (folder / "base.yaml").write_text("model: {width: 0.125, head_channels: 16}\n")
    data = f"data: {{dataset: folder, root: {folder / 'data'}, crop: [64, 64]}}"
    train = "train: {iterations: 2, batch_size: 2}"
    (folder / "own.yaml").write_text(f"_base_: base.yaml\n{data}\n{train}\n")
    done("train", folder / "own.yaml", "--work-dir", folder / "run")
    return folder


@pytest.fixture(scope="session")
def config(own: Path) -> Path:
    return own / "own.yaml"


@pytest.fixture(scope="session")
def checkpoint(own: Path) -> Path:
    return own / "run/best.safetensors"


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> SelectiveNetwork:
    return load_model(checkpoint)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    image = np.random.default_rng(1).integers(0, 256, (75, 97, 3), np.uint8)
    assert cv2.imwrite(str(tmp_path / "photo.png"), image)
    return tmp_path / "photo.png"


@pytest.fixture
def predict(checkpoint: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Predicts to `out`; what the JSON file then says."""

    def run(*arguments: object) -> dict[str, Any]:
        done("predict", checkpoint, *arguments, "--out", tmp_path / "out", "--json", tmp_path / "s.json")
        return json.loads((tmp_path / "s.json").read_text())

    return run
