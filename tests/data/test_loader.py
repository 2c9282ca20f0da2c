"""Samples depend on the seed and the position alone."""

import itertools
import pickle
import signal
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_seg.data import SegmentationDataset, build_dataset
from sparse_seg.data.loader import ResumableSampler, TrainingView, evaluation_loader, training_loader
from sparse_seg.data.transforms import IMAGENET_MEAN, IMAGENET_STD, TrainTransform, normalise
from sparse_seg.errors import DataError

_TRANSFORM = TrainTransform((16, 24))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SegmentationDataset:
    """Five frames of different sizes."""
    root = tmp_path_factory.mktemp("frames")
    rng = np.random.default_rng(0)
    for index in range(5):
        size = (20 + index, 30 + 2 * index)
        for folder, pixels in (
            ("train", rng.integers(0, 256, (*size, 3), np.uint8)),
            ("trainannot", rng.integers(0, 12, size, np.uint8)),
        ):
            (root / folder).mkdir(exist_ok=True)
            assert cv2.imwrite(str(root / folder / f"{index}.png"), pixels)
    return build_dataset("camvid", root, "train")


def keys(start: int = 0, length: int = 5) -> ResumableSampler:
    return ResumableSampler(length, 3, 7, start, 6)


def batches(
    dataset: SegmentationDataset, start: int, workers: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [tuple(b) for b in training_loader(dataset, _TRANSFORM, keys(start), 7, workers)]


def assert_same(first: list, second: list) -> None:
    assert len(first) == len(second)
    for (image, label), (other_image, other_label) in zip(first, second, strict=True):
        assert torch.equal(image, other_image)
        assert torch.equal(label, other_label)


def test_samples_do_not_depend_on_workers(dataset: SegmentationDataset) -> None:
    alone = batches(dataset, 0, workers=0)
    assert alone[0][0].shape == (3, 3, 16, 24)
    assert alone[0][1].shape == (3, 16, 24)
    assert_same(alone, batches(dataset, 0, workers=2))


def test_resumed_equals_unbroken(dataset: SegmentationDataset) -> None:
    assert_same(batches(dataset, 4, workers=0), batches(dataset, 0, workers=0)[4:])


def test_a_cache_changes_no_sample_and_reads_each_frame_once(
    dataset: SegmentationDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, load, reads = batches(dataset, 0, workers=0), dataset.load, list[int]()

    def counted(index: int) -> object:
        reads.append(index)
        return load(index)

    monkeypatch.setattr(dataset, "load", counted)
    assert_same(list(training_loader(dataset, _TRANSFORM, keys(), 7, 0, cache=True)), expected)
    assert sorted(reads) == list(range(5))


def test_loader_leaves_the_global_rng_alone(dataset: SegmentationDataset) -> None:
    before = torch.get_rng_state()
    batches(dataset, 0, workers=0)
    assert torch.equal(before, torch.get_rng_state())


def test_epochs_differ_in_augmentation(dataset: SegmentationDataset) -> None:
    view = TrainingView(dataset, _TRANSFORM, seed=0)
    assert not torch.equal(view[2][0], view[2 + len(dataset)][0])
    assert torch.equal(view[2][0], TrainingView(dataset, _TRANSFORM, seed=0)[2][0])
    assert not torch.equal(view[2][0], TrainingView(dataset, _TRANSFORM, seed=1)[2][0])


@pytest.mark.slow
@settings(deadline=None)
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


def test_sampler_rejects_an_empty_dataset() -> None:
    with pytest.raises(ValueError, match="length 0"):
        ResumableSampler(0, 4, 0, 0, 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_whole_frames_in_order(dataset: SegmentationDataset, workers: int) -> None:
    seen = list(evaluation_loader(dataset, IMAGENET_MEAN, IMAGENET_STD, workers))
    assert [index for _, _, index in seen] == list(range(5))
    for image, label, index in seen:
        frame, truth = dataset.load(index)
        assert torch.equal(image, normalise(frame)[None])
        assert label.dtype == torch.int64
        assert torch.equal(label, torch.from_numpy(truth.astype(np.int64))[None])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_damaged_file_is_one_line_with_workers_and_without(tmp_path: Path, kind: str, workers: int) -> None:
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
        for index in range(3):
            assert cv2.imwrite(str(tmp_path / folder / f"{index}.png"), np.zeros((40, 40), np.uint8))
    damaged = tmp_path / "trainannot" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    own = build_dataset("camvid", tmp_path, "train")
    if kind == "training":
        loader: Iterable = training_loader(own, _TRANSFORM, keys(0, len(own)), 7, workers)
    else:
        loader = evaluation_loader(own, IMAGENET_MEAN, IMAGENET_STD, workers)
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value).startswith(f"{damaged}: truncated, corrupt")
    assert "\n" not in str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) == handler, "torch's raises in the middle of whatever runs"


@pytest.mark.parametrize("cache", [False, True])
def test_loaders_can_be_sent_to_spawned_workers(dataset: SegmentationDataset, cache: bool) -> None:
    """Python 3.14 no longer forks them."""
    sampler = keys()
    for loader in (
        training_loader(dataset, _TRANSFORM, sampler, 7, 1, cache),
        evaluation_loader(dataset, IMAGENET_MEAN, IMAGENET_STD, 1),
    ):
        sent = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
        own, other = (map(torch.as_tensor, view[3]) for view in (loader.dataset, sent[0]))
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
