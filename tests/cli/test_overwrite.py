"""No command replaces what it reads, or a file of the user's, under whatever name."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from sparse_seg.data.scenes import write_scenes
from sparse_seg.lab.predict.files import OutputFiles, find_sources
from tests.cli.commands import done, fails


@pytest.fixture
def folder(own, tmp_path, monkeypatch) -> Path:
    """A copy of the data, configs and network, with a photo and a video, in which we work."""
    shutil.copytree(own / "data", tmp_path / "data")
    for name in ("base.yaml", "own.yaml", "run/best.safetensors"):
        shutil.copy(own / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    os.rename("best.safetensors", "net.safetensors")
    Path("own.yaml").write_text(Path("own.yaml").read_text().replace(str(own), "."))
    picture("photo.png")
    write_video("drive.mp4")
    return tmp_path


def picture(path: str | Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert cv2.imwrite(str(path), pixels)


def write_video(name: str | Path) -> None:
    writer = cv2.VideoWriter(str(name), cv2.VideoWriter.fourcc(*"mp4v"), 25, (64, 64))
    for step in range(2):
        writer.write(np.full((64, 64, 3), 60 * step, np.uint8))
    writer.release()


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture, *command: object, code: int = 1) -> str:
    """A command's complaint; all files must be as they were, and none be added."""
    before = contents()
    line = fails(capsys, *command, code=code)
    assert contents() == before
    return line


def linked(path: str, link: Callable[[str, str], None]) -> str:
    link(path, f"link{Path(path).suffix}")
    return f"link{Path(path).suffix}"


NAMES: dict[str, Callable[[str], str]] = {
    "same": lambda path: path,
    "hard link": lambda path: linked(path, os.link),
    "symbolic link": lambda path: linked(path, os.symlink),
    "the other way round": lambda path: str(Path("..", Path.cwd().name, path)),
}


EXPORT = ("export", "--size", "64x64")
EVALUATE = ("evaluate", "own.yaml", "net.safetensors")
COMMANDS = (
    (("fit-gain", "own.yaml", "net.safetensors"), ("net.safetensors", "own.yaml")),
    ((*EXPORT, "own.yaml", "net.safetensors"), ("net.safetensors", "base.yaml")),
    ((*EXPORT, "net.safetensors"), ("net.safetensors",)),
    (("calibrate", "own.yaml", "net.safetensors", "--out"), ("net.safetensors",)),
    (
        ("browse", "own.yaml", "--out"),
        ("own.yaml", "base.yaml", "data/classes.yaml", "data/val/labels/a.png"),
    ),
    ((*EVALUATE, "--json"), ("net.safetensors", "own.yaml", "data/val/images/a.png")),
    ((*EVALUATE, "--compare", "0.1", "--report"), ("net.safetensors", "data/classes.yaml")),
    (
        ("predict", "own.yaml", "net.safetensors", "photo.png", "--out", "o", "--json"),
        ("net.safetensors", "base.yaml", "photo.png"),
    ),
    (("benchmark", "own.yaml", "--checkpoint", "net.safetensors", "--json"), ("net.safetensors",)),
)


def test_an_output_that_is_an_input_is_refused(folder, capsys):
    for arguments, inputs in COMMANDS:
        for path in inputs:
            line = refused(capsys, *arguments, path)
            assert f"{path} is an input and would be overwritten; name another output" in line


@pytest.mark.parametrize("kind", NAMES)
def test_whatever_it_is_called(kind, folder, capsys):
    name = NAMES[kind]("net.safetensors")
    export = ["export", "net.safetensors", name, "--size", "64x64"]
    assert "would be overwritten" in refused(capsys, *export)
    assert "argument DST: is SRC" in refused(capsys, "convert", "net.safetensors", name, code=2)


def test_neither_a_video_nor_shipped_weights_are_replaced(folder, capsys, monkeypatch):
    for source in ("drive.mp4", folder / "drive.mp4"):
        assert "would be overwritten" in refused(capsys, "predict", "net.safetensors", source, "--out", ".")
    monkeypatch.setattr("sparse_seg.checkpoint.file.SHIPPED", folder)
    export = ["export", "net", folder / "net.safetensors", "--size", "64x64"]
    assert "would be overwritten" in refused(capsys, *export)


def test_inputs_that_are_still_to_be_read(folder, capsys):
    predict = ["predict", "--out", ".", "net.safetensors"]
    picture("photo_ids.png")
    assert "photo_ids.png is an input" in refused(capsys, *predict, "photo.png", "photo_ids.png")
    write_video("drive_blocks.mp4")
    both = [*predict, "drive.mp4", "drive_blocks.mp4"]
    Path("away").mkdir()
    assert "is an input" in refused(capsys, *both)
    both[2] = "away"
    assert "two outputs would be written to away/drive_blocks.mp4" in refused(
        capsys, *both, "--video-blocks", "--fine-fraction", "0.2"
    )
    Path("drive_ids").mkdir()
    picture("drive_ids/000001.png")
    frames = [*predict, "drive_ids/000001.png", "away/drive.mp4", "--video-ids"]
    os.rename("drive.mp4", "away/drive.mp4")
    assert "drive_ids/000001.png is an input" in refused(capsys, *frames)


def test_what_stands_beside_an_input_and_two_outputs_in_one_file(folder, capsys):
    """A picture or video of another's, by the name of what would be written."""
    picture("photo_ids.png")
    write_video("drive.avi")
    for source, there in (("photo.png", "photo_ids.png"), ("drive.avi", "drive.mp4")):
        said = refused(capsys, "predict", "--out", ".", "net.safetensors", source)
        assert f"{there} is there already, beside {source}; name another folder" in said
    compare = ["evaluate", "own.yaml", "net.safetensors", "--compare", "0.1", "--json", "r.png", "--report"]
    assert "two outputs would be written to r.png" in refused(capsys, *compare, "r.html")
    ids = ["predict", "net.safetensors", "photo.png", "--out", "o", "--json", "o/../o/photo_ids.png"]
    assert "two outputs would be written to" in refused(capsys, *ids)
    assert "two outputs would be written to x.md" in refused(capsys, "gpu", "--json", "x.md")


def test_devices_and_empty_names_are_no_outputs(folder, capsys):
    predict = ["predict", "net.safetensors", "photo.png", "--out"]
    os.mkfifo("pipe")
    assert "pipe is no regular file" in fails(capsys, *predict, "o", "--json", "pipe", code=2)
    assert "/dev/null is no regular file" in fails(capsys, *predict, "o", "--json", "/dev/null", code=2)
    assert "argument --out: is empty" in refused(capsys, *predict, "", code=2)
    assert "argument --json: is empty" in refused(capsys, *predict, "o", "--json", "", code=2)
    assert "argument OUT: is empty" in refused(capsys, "make-scenes", "", code=2)
    assert "argument --work-dir: is empty" in refused(capsys, "train", "own.yaml", "--work-dir", "", code=2)
    assert "an input is an empty text" in refused(
        capsys, "predict", "net.safetensors", "", "--out", "../somewhere"
    )


def test_a_foreign_class_file_stands(folder, capsys):
    Path("data/classes.yaml").write_text("names: [sand, rock]\nids: [3, 7]\nignore: [0, 255]\n")
    predict = ["predict", "net.safetensors", "photo.png", "--out"]
    assert "data/classes.yaml is there and says other classes" in refused(capsys, *predict, "data")
    Path("o").mkdir()
    Path("o/classes.yaml").write_text("no: [yaml")
    assert "o/classes.yaml is there and says other classes" in refused(capsys, *predict, "o")
    for _ in range(2):  # its own is no foreign one, and stays
        done(*predict, "p", "--ids-only")
    own = Path("p/classes.yaml")
    own.write_text("# mine\n" + own.read_text())
    done(*predict, "p", "--ids-only")
    assert own.read_text().startswith("# mine\n")


def test_a_training_keeps_configs_and_checkpoints(folder, capsys):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("data: {dataset: folder, root: data, crop: [32, 32]}\n")
    Path("run/base.yaml").write_text("")
    train = ["train", "--work-dir", "run"]
    assert "run/config.yaml is an input" in refused(capsys, *train, "run/config.yaml")
    Path("upon.yaml").write_text("_base_: run/config.yaml\n")
    assert "run/config.yaml is an input" in refused(capsys, *train, "upon.yaml")
    line = refused(capsys, *train, "own.yaml")
    assert "run/config.yaml is not of a run and would be overwritten; choose another --work-dir" in line
    os.remove("run/config.yaml")
    os.rename("net.safetensors", "run/best.safetensors")
    for key in ("model.pretrained", "train.init", "train.distill.teacher"):
        line = refused(capsys, *train, "own.yaml", "--set", f"{key}=run/best.safetensors")
        assert "run/best.safetensors is an input" in line


@pytest.mark.slow
def test_a_run_resumes_from_its_own_config(folder):
    train = ["train", "--work-dir", "run"]
    done(*train, "own.yaml")
    done(*train, "run/config.yaml", "--resume", "--set", "train.iterations=3")
    os.remove("run/last.pt")
    done(*train, "own.yaml")  # a config.yaml that a run wrote is replaced


def test_an_ablation_and_a_demo_keep_their_configs(folder, capsys):
    Path("w").mkdir()
    network = "networks: {n: {config: ../own.yaml, set: [model.num_classes=null]}}\n"
    runs = "runs: [{networks: [n], dense: [8]}]\n"
    Path("w/results.json").write_text(network + runs)
    line = refused(capsys, "ablate", "w/results.json", "--work-dir", "w")
    assert "w/results.json is an input" in line
    write_scenes(folder / "d/scenes", 10, (64, 64))
    Path("d/comparison.json").write_text("model: {width: 0.125}\n")
    line = refused(capsys, "demo", "--out", "d", "--config", "d/comparison.json", "--count", "10")
    assert "d/comparison.json is an input" in line


def test_what_is_written_is_what_was_checked(folder):
    """The files that a prediction checks beforehand are those that it writes."""
    every = ["--show-levels", "--steps", "0.1", "0.5", "--video-ids", "--video-blocks"]
    done("predict", "net.safetensors", "photo.png", "drive.mp4", "--out", "o", *every)
    kinds = ("ids", "overlay", "classes", "blocks", "levels", "steps")
    outputs = OutputFiles(Path("o"), kinds, True, True)
    expected = {file for source in find_sources(["photo.png", "drive.mp4"]) for file in outputs.files(source)}
    written = {path for path in Path("o").rglob("*") if path.is_file()}
    assert written == expected | {Path("o/classes.yaml"), Path("o/legend.png")}
