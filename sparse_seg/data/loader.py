"""Loaders whose samples depend on the seed and the position alone: not on workers, not on interruptions."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from sparse_seg.data.dataset import SegmentationDataset
from sparse_seg.data.transforms import TrainTransform, normalise
from sparse_seg.errors import DataError

Sample = tuple[torch.Tensor, torch.Tensor]
_Batch = TypeVar("_Batch")


class TrainingView(Dataset[Sample]):
    """A dataset seen through a transform; `key = epoch * len(dataset) + index` picks a sample and its rng.

    With `cache`, decoded frames stay in memory.
    """

    def __init__(
        self, dataset: SegmentationDataset, transform: TrainTransform, seed: int, cache: bool = False
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int) -> Sample:
        """Image float32 `[3, h, w]` and label int64 `[h, w]`."""
        image, label = self._load(key % len(self.dataset))
        return self.transform(image, label, np.random.default_rng([self.seed, key]))

    def _load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if self._kept is None:
            return self.dataset.load(index)
        if index not in self._kept:
            self._kept[index] = self.dataset.load(index)
        return self._kept[index]


class ResumableSampler(Sampler[list[int]]):
    """Batches of keys for `TrainingView`, cut from an endless stream of epochs, each newly shuffled.

    A batch may cross from one epoch to the next, so all have `batch_size` keys. Starting at
    `start_iteration` gives the batches that an unbroken run would give from there. `part` (i, n) gives the
    i-th of n parts of each batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        start_iteration: int,
        iterations: int,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"length {length} and batch_size {batch_size} must be at least 1")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.start_iteration = start_iteration
        self.iterations = iterations
        self.part = part

    def __len__(self) -> int:
        return max(self.iterations - self.start_iteration, 0)

    def __iter__(self) -> Iterator[list[int]]:
        keys = self._keys(self.start_iteration * self.batch_size)
        number, count = self.part
        for _ in range(len(self)):
            yield [next(keys) for _ in range(self.batch_size)][number::count]

    def _keys(self, position: int) -> Iterator[int]:
        epoch, skip = divmod(position, self.length)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            for index in order[skip:]:
                yield epoch * self.length + int(index)
            epoch, skip = epoch + 1, 0


class EvaluationView(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """A dataset's frames as they are, normalised."""

    def __init__(self, dataset: SegmentationDataset, mean: Sequence[float], std: Sequence[float]) -> None:
        self.dataset = dataset
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Image float32 `[1, 3, H, W]`, label int64 `[1, H, W]` and the index."""
        image, label = self.dataset.load(index)
        target = torch.from_numpy(label.astype(np.int64))
        return normalise(image, self.mean, self.std)[None], target[None], index


@dataclass(frozen=True)
class _Failure:
    """In place of a sample or batch: an exception would arrive as its worker's traceback."""

    message: str


class _Named(Dataset[Any]):
    """A view whose failures are samples."""

    def __init__(self, view: Dataset[Any]) -> None:
        self.view = view

    def __len__(self) -> int:
        return len(self.view)  # type: ignore[arg-type]

    def __getitem__(self, key: int) -> Any:
        try:
            return self.view[key]
        except DataError as error:
            return _Failure(str(error))
        except MemoryError:
            return _Failure("no memory to read an image; lower data.workers")


def _collate(samples: list[Any]) -> Any:
    failures = [sample for sample in samples if isinstance(sample, _Failure)]
    return failures[0] if failures else default_collate(samples)


class _Loader(DataLoader[_Batch]):
    """A loader whose iteration raises a DataError of one line, in the process that iterates."""

    def __iter__(self) -> Iterator[_Batch]:  # type: ignore[override]
        iterator = _quietly(super().__iter__)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: killed as it sent
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                raise DataError(
                    "a data worker was killed, as happens where memory or shared memory runs out; lower "
                    "data.workers"
                ) from None
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            yield batch


def _quietly(start: Callable[[], Iterator[_Batch]]) -> Iterator[_Batch]:
    """Start a loader's workers, without the handler by which torch raises their death in the middle of
    whatever runs, a training step for instance; the loader sees it too, when it waits for them."""
    if threading.current_thread() is not threading.main_thread():
        return start()
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return start()
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)


def training_loader(
    dataset: SegmentationDataset,
    transform: TrainTransform,
    keys: ResumableSampler,
    seed: int,
    workers: int,
    cache: bool = False,
) -> DataLoader[Sample]:
    """Batches of the keys: float32 `[B, 3, h, w]` and int64 `[B, h, w]`.

    cache: see `TrainingView`.
    """
    view = TrainingView(dataset, transform, seed, cache)
    return _loader(view, workers, collate_fn=_collate, batch_sampler=keys)


def evaluation_loader(
    dataset: SegmentationDataset,
    mean: Sequence[float],
    std: Sequence[float],
    workers: int,
    frames: Sequence[int] | None = None,
) -> DataLoader[tuple[torch.Tensor, torch.Tensor, int]]:
    """The frames (default: all) one at a time: float32 `[1, 3, H, W]`, int64 `[1, H, W]`, index."""
    return _loader(EvaluationView(dataset, mean, std), workers, batch_size=None, sampler=frames)


def _loader(view: Dataset[Any], workers: int, **options: Any) -> DataLoader[Any]:
    return _Loader(
        _Named(view),
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each loader draws from torch's global state, and resuming differs
        **options,
    )


def _start_worker(worker: int) -> None:
    """One thread, since workers are the parallelism; Ctrl-C is left to the main process, which ends them."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the trainer's handler, inherited by the fork
