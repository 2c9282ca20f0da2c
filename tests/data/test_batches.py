"""Samples depend on the seed and the position alone, and frames on a device give the same crops."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import signal
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_seg.config import Config, DataConfig, config_from_dict
from sparse_seg.data import SegmentationDataset, build_dataset
from sparse_seg.data.batches import ResumableSampler, TrainingView, evaluation_loader, training_batches
from sparse_seg.data.transforms import TrainTransform, normalise
from sparse_seg.errors import DataError
from tests.data.files import write

CPU = torch.device("cpu")
RANGE = 1 / 0.225  # of a normalised channel


def dataset_of(root: Path, sizes: list[tuple[int, int]]) -> SegmentationDataset:
    """Frames of smooth colours and labels in cells of 16 px."""
    rng = np.random.default_rng(0)
    for index, size in enumerate(sizes):
        coarse = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), np.uint8)
        image = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
        cells = rng.integers(0, 12, (size[0] // 16 + 1, size[1] // 16 + 1), np.uint8)
        label = np.kron(cells, np.ones((16, 16), np.uint8))[: size[0], : size[1]]
        for folder, pixels in (("train", image), ("trainannot", label)):
            write(root / folder / f"{index}.png", np.asarray(pixels))
    return build_dataset("camvid", root, "train")


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> SegmentationDataset:
    return dataset_of(tmp_path_factory.mktemp("alike"), [(56, 80)] * 4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SegmentationDataset:
    """Five frames of different sizes."""
    sizes = [(24 + index, 32 + 2 * index) for index in range(5)]
    return dataset_of(tmp_path_factory.mktemp("frames"), sizes)


def config(**data: Any) -> Config:
    return config_from_dict(
        {"data": {"crop": [48, 64], "gamma": 0.4} | data, "train": {"batch_size": 3, "seed": 5}}, "the test"
    )


def batches(
    dataset: SegmentationDataset,
    config: Config,
    start: int = 0,
    end: int = 6,
    part: tuple[int, int] = (0, 1),
    device: torch.device | None = CPU,
) -> list[Any]:
    return list(training_batches(dataset, config, start, end, part, device))


def same(first: list[Any], second: list[Any]) -> bool:
    pairs = zip(itertools.chain(*first), itertools.chain(*second), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("on_device", [False, True])
def test_batches_depend_on_the_seed_and_the_position_alone(alike, on_device: bool) -> None:
    """Not on where a run resumed, on the parts of a batch, nor on the global random numbers."""
    own, before = config(on_device=on_device), torch.get_rng_state()
    whole = batches(alike, own)
    assert same(whole[4:], batches(alike, own, 4))
    parts = [batches(alike, own, 0, 1, (part, 3))[0] for part in range(3)]
    assert torch.equal(torch.cat([images for images, _ in parts]), whole[0][0])
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(whole[0][0], whole[4][0]), "another epoch, another crop"


def test_neither_workers_nor_a_cache_change_a_sample(
    dataset: SegmentationDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = batches(dataset, config())
    assert (alone[0][0].shape, alone[0][1].shape) == ((3, 3, 48, 64), (3, 48, 64))
    assert same(alone, batches(dataset, config(workers=2)))
    load, reads = dataset.load, list[int]()

    def counted(index: int) -> object:
        reads.append(index)
        return load(index)

    monkeypatch.setattr(dataset, "load", counted)
    assert same(alone, batches(dataset, config(cache=True)))
    assert sorted(reads) == list(range(5)), "each frame once"


@given(
    length=st.integers(1, 13),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
    start=st.integers(0, 12),
    more=st.integers(0, 12),
)
def test_sampler(length: int, batch_size: int, seed: int, start: int, more: int) -> None:
    unbroken = list(ResumableSampler(length, batch_size, seed, 0, start + more))
    resumed = ResumableSampler(length, batch_size, seed, start, start + more)
    assert list(resumed) == unbroken[start:]
    assert len(resumed) == more
    assert all(len(keys) == batch_size for keys in unbroken)
    stream = list(itertools.chain(*unbroken))
    for epoch in range(len(stream) // length):
        keys = stream[epoch * length : (epoch + 1) * length]
        assert sorted(keys) == list(range(epoch * length, (epoch + 1) * length))


def test_sampler_shuffles_each_epoch_anew() -> None:
    keys = list(itertools.chain(*ResumableSampler(50, 10, 0, 0, 10)))
    first, second = keys[:50], [key - 50 for key in keys[50:]]
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_whole_frames_in_order(dataset: SegmentationDataset, workers: int) -> None:
    seen = list(evaluation_loader(dataset, DataConfig(workers=workers)))
    assert [index for _, _, index in seen] == list(range(5))
    for image, label, index in seen:
        frame, truth = dataset.load(index)
        assert torch.equal(image, normalise(frame)[None])
        assert label.dtype == torch.int64
        assert torch.equal(label, torch.from_numpy(truth.astype(np.int64))[None])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_one_line_with_workers_and_without(tmp_path: Path, workers: int) -> None:
    own = dataset_of(tmp_path, [(48, 48)] * 3)
    damaged = tmp_path / "trainannot" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    handler = signal.getsignal(signal.SIGCHLD)
    for loader in (
        training_batches(own, config(workers=workers), 0, 6),
        evaluation_loader(own, DataConfig(workers=workers)),
    ):
        with pytest.raises(DataError) as caught:
            list(loader)
        assert str(caught.value).startswith(f"{damaged}: truncated, corrupt")
        assert "\n" not in str(caught.value)
        assert not multiprocessing.active_children(), "they end at once"
    assert signal.getsignal(signal.SIGCHLD) == handler, "torch's raises in the middle of whatever runs"


@pytest.mark.parametrize("cache", [False, True])
def test_loaders_can_be_sent_to_spawned_workers(dataset: SegmentationDataset, cache: bool) -> None:
    """Python 3.14 no longer forks them."""
    view = TrainingView(dataset, TrainTransform(config().data), 7, cache)
    for loader in (evaluation_loader(dataset, DataConfig()), torch.utils.data.DataLoader(view)):
        sent = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
        own, other = (map(torch.as_tensor, view[3]) for view in (loader.dataset, sent[0]))
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


@pytest.mark.parametrize("scale", [(0.5, 2.0), (0.3, 0.5)])
def test_crops_of_frames_on_a_device_are_the_loaders(alike, scale: tuple[float, float], device: str) -> None:
    """With padding where a scaled frame is smaller than the crop, and up to rounding."""
    keys: dict[str, Any] = {"scale_range": list(scale)}
    own = batches(alike, config(on_device=True, **keys), 2, 8, device=torch.device(device))
    expected, padded = batches(alike, config(**keys), 2, 8), 0
    assert len(own) == len(expected) == 6
    for (images, labels), (other_images, other_labels) in zip(own, expected, strict=True):
        assert images.device.type == labels.device.type == device
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        difference = (images.cpu() - other_images).abs()
        assert difference.mean() < 0.004 * RANGE  # a grey value: OpenCV rounds twice
        assert difference.quantile(0.999) < 0.04 * RANGE  # gamma is steep in the dark
        assert (labels.cpu() != other_labels).float().mean() < 0.01  # a pixel between two
        padded += int((labels == 255).sum())
    assert padded > 0
    keys = {"gamma": 0, "jitter": 0}
    (one,), (other,) = (batches(alike, config(on_device=on, **keys), 0, 1) for on in (True, False))
    assert (one[0] - other[0]).abs().max() < 0.02 * RANGE


def refused(dataset: SegmentationDataset) -> str:
    with pytest.raises(DataError) as caught:
        batches(dataset, config(on_device=True))
    return str(caught.value)


def test_frames_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = dataset_of(tmp_path, [(56, 80), (56, 64)])
    assert refused(dataset) == (
        "only frames of one size can be kept on a device, but 0 has 56x80 px and 1 56x64; set "
        "data.on_device=false"
    )
    ((images, _),) = batches(dataset, config(on_device=True), 0, 1, device=None)
    assert images.shape == (3, 3, 48, 64), "without a device they are read when needed, of any sizes"
    (tmp_path / "train/1.png").write_bytes(b"none")
    assert refused(dataset).startswith(f"{tmp_path / 'train/1.png'}")

    def full(*arguments: object, **options: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(torch, "empty", full)
    assert refused(dataset).startswith("no room for 2 frames and their crops on cpu; set data.on_")
