"""16-bit files of 10 to 16 used bits: one answer for a data set or a folder, said where it cannot be told."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from sparse_seg.config import load_config
from sparse_seg.data import build_dataset
from sparse_seg.data.depth import find_depth
from sparse_seg.data.reading import read_image
from sparse_seg.errors import ConfigError
from tests.data.files import camvid, write

DARK, BRIGHT = 3000, 4200  # below and above 12 bits


def frame(highest: int, dtype: type = np.uint16) -> np.ndarray:
    """Values around 2000, one pixel of the highest."""
    pixels = np.random.default_rng(0).integers(1500, 2500, (48, 64, 3))
    pixels[0, 0] = highest
    return pixels.astype(dtype)


def frames(folder: Path, *highest: int) -> list[Path]:
    files = [folder / f"{number}.png" for number in range(len(highest))]
    for file, value in zip(files, highest, strict=True):
        write(file, frame(value))
    return files


@pytest.mark.parametrize(
    ("highest", "bits", "ceiling"),
    [((DARK, DARK), 12, 4095), ((DARK, BRIGHT), 16, 16383), ((DARK, 60000), 16, None)],
)
def test_one_answer_for_all_files(tmp_path: Path, highest, bits: int, ceiling: int | None) -> None:
    files = frames(tmp_path, *highest)
    depth = find_depth(files, None, "set it")
    assert depth.bits == bits
    if ceiling is None:
        assert not depth.note, "only 16 bits hold such a value"
    else:
        assert f"2 of 2 images have 16 bits per channel but no value above {ceiling}" in depth.note
        assert f"read as {bits}-bit pictures; if they are of another depth, set it" in depth.note
    means = [read_image(file, bits=depth.bits).mean() for file in files]
    assert means[0] == pytest.approx(means[1], rel=0.02)
    assert find_depth(files, 14, "set it") == (14, "")


def test_of_many_files_some_are_looked_at(tmp_path: Path) -> None:
    files = frames(tmp_path, *[DARK] * 40)
    assert "but no value above 4095 in 32 of them, such as 0.png" in find_depth(files, None, "set it").note


def test_values_above_the_bits_are_clipped(tmp_path: Path) -> None:
    (file,) = frames(tmp_path, BRIGHT)
    pixels = read_image(file, bits=12)
    assert pixels[0, 0].tolist() == [255] * 3
    np.testing.assert_array_equal(pixels[1:], (frame(BRIGHT)[1:, :, ::-1] >> 4).astype(np.uint8))
    np.testing.assert_array_equal(read_image(file, bits=14), (frame(BRIGHT)[..., ::-1] >> 6))


def test_8_bits_and_files_that_tell_need_no_guess(tmp_path: Path) -> None:
    write(tmp_path / "a.png", frame(255, np.uint8))
    pixels = frame(1023).clip(0, 1023)
    (tmp_path / "b.ppm").write_bytes(b"P6\n# c\n64 48\n1023\n" + pixels[..., ::-1].astype(">u2").tobytes())
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    (tmp_path / "empty.tif").touch()
    assert find_depth(sorted(tmp_path.iterdir()), None, "set it") == (None, "")
    np.testing.assert_array_equal(read_image(tmp_path / "b.ppm", bits=16), pixels[..., ::-1] >> 2)


def deep_camvid(root: Path, **splits: tuple[int, ...]) -> Path:
    for split, highest in splits.items():
        camvid(root, *[np.resize(np.array([3, 4], np.uint8), (48, 64))] * len(highest), split=split)
        frames(root / split, *highest)
    return root


def test_the_unit_is_the_whole_data_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = deep_camvid(tmp_path, train=(DARK, DARK), val=(DARK, BRIGHT))
    (root / "val" / "left_out.txt").touch()
    datasets = [build_dataset("camvid", root, split) for split in ("train", "val")]
    caplog.clear()
    for dataset in datasets:
        dataset.check()
    assert [message.split(": ", 2)[2] for message in caplog.messages] == [datasets[0].depth.note] * 2
    assert "read as 16-bit pictures; if they are of another depth, set data.bits" in caplog.messages[0]
    images = [dataset.load(index)[0].mean() for dataset in datasets for index in range(2)]
    assert max(images) < 1.1 * min(images)
    alone = pickle.loads(pickle.dumps(build_dataset("camvid", root, "train")))  # as sent to a data worker
    assert alone.depth == datasets[0].depth


def test_a_data_sets_bits_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = deep_camvid(tmp_path, train=(DARK, BRIGHT), val=(DARK,))
    dataset = build_dataset("camvid", root, "train", 12)
    dataset.check()
    (message,) = caplog.messages
    assert "1 of 2 images have values up to 4200, such as 1.png: read as 12-bit pictures" in message
    assert dataset.load(0)[0].mean() > 100
    (tmp_path / "own.yaml").write_text(f"data: {{dataset: camvid, root: {root}, bits: 12}}\n")
    assert load_config(tmp_path / "own.yaml").data.bits == 12
    with pytest.raises(ConfigError, match=r"data\.bits is 13; choose one of 10, 12, 14, 16"):
        load_config(tmp_path / "own.yaml", ["data.bits=13"])
