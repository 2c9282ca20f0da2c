"""The command line of make_scenes."""

from pathlib import Path

import pytest

from sparse_seg.cli import main
from sparse_seg.data import build_dataset
from sparse_seg.data.scenes import FRAMES


@pytest.mark.slow
def test_writes_and_then_keeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["make_scenes", str(tmp_path / "out"), "--count", "3", "--size", "32x48", "--seed", "2"]
    assert main(command) == 0
    assert "3 scenes written to" in capsys.readouterr().out
    build_dataset("scenes", tmp_path / "out", "train").check()
    assert main(command) == 0
    assert "3 scenes are already in" in capsys.readouterr().out


@pytest.mark.slow
def test_a_camera_that_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["make_scenes", str(tmp_path / "out"), "--count", "3", "--size", "32x48", "--pan", "5"]
    assert main(command) == 0
    dataset = build_dataset("scenes", tmp_path / "out", "train")
    dataset.check()
    assert [number for number in range(len(dataset)) if dataset.starts(number)] == [0, FRAMES]
    for before, frame in ((0, 1), (8, 9), (10, 11)):
        for one, two in zip(dataset.load(before), dataset.load(frame), strict=True):
            assert one.shape[:2] == (32, 48)
            assert (one[:, 5:] == two[:, :-5]).all()
    assert main(command) == 0
    assert "3 scenes are already in" in capsys.readouterr().out
    command[-1] = "6"
    assert main(command) == 1, "another speed is another data set"


def test_refusal_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["make_scenes", str(tmp_path), "--count", "2", "--size", "32x48"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "choose another folder" in message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "256", "HEIGHTxWIDTH"),
        ("--size", "0x48", "HEIGHTxWIDTH"),
        ("--size", "-4x48", "HEIGHTxWIDTH"),
        ("--size", "16x48", "at least 32 px"),
        ("--count", "1", "whole number from 2"),
        ("--count", "many", "whole number from 2"),
        ("--seed", "-1", "whole number from 0"),
    ],
)
def test_bad_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["make_scenes", str(tmp_path / "out"), f"{option}={value}"])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
