"""Frames on a device give the loader's crops, up to rounding, and say in a line what does not fit."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sparse_seg.config import Config, config_from_dict
from sparse_seg.data import SegmentationDataset, build_dataset
from sparse_seg.data.batches import training_batches
from sparse_seg.errors import DataError

_RANGE = 1 / 0.225  # of a normalised channel


def dataset_of(root: Path, sizes: list[tuple[int, int]]) -> SegmentationDataset:
    """Frames of smooth colours and labels in cells of 16 px."""
    rng = np.random.default_rng(0)
    for index, size in enumerate(sizes):
        coarse = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
        image = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
        cells = rng.integers(0, 12, (size[0] // 16 + 1, size[1] // 16 + 1), np.uint8)
        label = np.kron(cells, np.ones((16, 16), np.uint8))[: size[0], : size[1]]
        for folder, pixels in (("train", image), ("trainannot", label)):
            (root / folder).mkdir(exist_ok=True)
            assert cv2.imwrite(str(root / folder / f"{index}.png"), pixels)
    return build_dataset("camvid", root, "train")


CPU = torch.device("cpu")


def config(
    on_device: bool = True,
    scale_range: tuple[float, float] = (0.5, 2.0),
    gamma: float = 0.4,
    jitter: float = 0.3,
) -> Config:
    data = {"crop": [96, 128], "scale_range": list(scale_range), "gamma": gamma, "jitter": jitter}
    data["on_device"] = on_device
    return config_from_dict({"data": data, "train": {"batch_size": 3, "seed": 5}}, "the test")


@pytest.mark.parametrize("scale", [(0.5, 2.0), (0.3, 0.5)])
def test_crops_are_the_loaders(tmp_path: Path, scale: tuple[float, float], device: str) -> None:
    """With padding where a scaled frame is smaller than the crop."""
    dataset = dataset_of(tmp_path, [(112, 160)] * 4)
    own = list(training_batches(dataset, config(True, scale), 2, 8, device=torch.device(device)))
    expected = list(training_batches(dataset, config(False, scale), 2, 8))
    assert len(own) == len(expected) == 6
    padded = 0
    for (images, labels), (other_images, other_labels) in zip(own, expected, strict=True):
        assert images.device.type == labels.device.type == device
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        difference = (images.cpu() - other_images).abs()
        assert difference.mean() < 0.004 * _RANGE  # a grey value: OpenCV rounds twice
        assert difference.quantile(0.999) < 0.04 * _RANGE  # gamma is steep in the dark
        assert (labels.cpu() != other_labels).float().mean() < 0.01  # a pixel between two
        padded += int((labels == 255).sum())
    assert padded > 0


def test_batches_depend_on_the_seed_and_the_position_alone(tmp_path: Path) -> None:
    dataset, resident = dataset_of(tmp_path, [(112, 160)] * 4), config()
    whole = list(training_batches(dataset, resident, 0, 6, device=CPU))
    late = list(training_batches(dataset, resident, 4, 6, device=CPU))
    assert all(torch.equal(*pair) for pair in zip(whole[4] + whole[5], late[0] + late[1], strict=True))
    parts = [next(iter(training_batches(dataset, resident, 0, 1, (part, 3), CPU))) for part in range(3)]
    assert torch.equal(torch.cat([images for images, _ in parts]), whole[0][0])


def test_without_jitter_and_gamma(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, [(112, 160)] * 2)
    (own,) = training_batches(dataset, config(True, gamma=0, jitter=0), 0, 1, device=CPU)
    (expected,) = training_batches(dataset, config(False, gamma=0, jitter=0), 0, 1)
    assert (own[0] - expected[0]).abs().max() < 0.02 * _RANGE


def refused(dataset: SegmentationDataset) -> str:
    with pytest.raises(DataError) as caught:
        next(iter(training_batches(dataset, config(), 0, 1, device=CPU)))
    return str(caught.value)


def test_frames_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_of(tmp_path, [(112, 160), (112, 128)])
    assert refused(dataset) == (
        "only frames of one size can be kept on a device, but 0 has 112x160 px and 1 112x128; set "
        "data.on_device=false"
    )
    (tmp_path / "train/1.png").write_bytes(b"none")
    assert refused(dataset).startswith(f"{tmp_path / 'train/1.png'}")

    def full(*arguments: object, **options: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(torch, "empty", full)
    assert refused(dataset).startswith("no room for 2 frames and their crops on cpu; set data.on_")


def test_without_a_device_frames_are_read_when_needed(tmp_path: Path) -> None:
    """As `browse` and the recalibration of batch statistics read them: of any sizes, a few of many."""
    dataset = dataset_of(tmp_path, [(112, 160), (112, 128)])
    ((images, _),) = training_batches(dataset, config(), 0, 1)
    assert images.shape == (3, 3, 96, 128)
