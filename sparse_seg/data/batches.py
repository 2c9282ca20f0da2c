"""Frames in batches that depend on the seed and the position alone: not on workers, not on interruptions."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sparse_seg.config import Config, DataConfig
from sparse_seg.data.dataset import Image, SegmentationDataset
from sparse_seg.data.resident import ResidentBatches
from sparse_seg.data.sampler import ResumableSampler
from sparse_seg.data.transforms import TrainTransform, normalise
from sparse_seg.errors import DataError

Sample = tuple[Tensor, Tensor]
_Batch = TypeVar("_Batch")


def training_batches(
    dataset: SegmentationDataset,
    config: Config,
    start_iteration: int,
    iterations: int,
    part: tuple[int, int] = (0, 1),
    device: torch.device | None = None,
) -> Iterable[Sample]:
    """Iterations `start_iteration` to before `iterations`: float32 `[B, 3, h, w]` and int64 `[B, h, w]`.

    Args:
        part: (i, n) for the i-th of n parts of each batch.
        device: where frames are kept with `data.on_device`; None: they are read when needed.
    """
    data, train, transform = config.data, config.train, TrainTransform(config.data)
    keys = ResumableSampler(len(dataset), train.batch_size, train.seed, start_iteration, iterations, part)
    if data.on_device and device is not None:
        return ResidentBatches(dataset, transform, keys, device)
    view = TrainingView(dataset, transform, train.seed, data.cache)
    return _loader(view, data.workers, batch_sampler=keys)


def evaluation_loader(
    dataset: SegmentationDataset, data: DataConfig, frames: Sequence[int] | None = None
) -> DataLoader[tuple[Tensor, Tensor, int]]:
    """The frames (default: all) one at a time: float32 `[1, 3, H, W]`, int64 `[1, H, W]`, index."""
    return _loader(EvaluationView(dataset, data), data.workers, batch_size=None, sampler=frames)


class TrainingView(Dataset[Sample]):
    """A dataset seen through a transform; `key = epoch * len(dataset) + index` picks a sample and its rng.

    With `cache`, decoded frames stay in memory.
    """

    def __init__(
        self, dataset: SegmentationDataset, transform: TrainTransform, seed: int, cache: bool = False
    ) -> None:
        self.dataset, self.transform, self.seed, self.cache = dataset, transform, seed, cache
        self._kept: dict[int, tuple[Image, Image]] = {}

    def __getitem__(self, key: int) -> Sample:
        """Image float32 `[3, h, w]` and label int64 `[h, w]`."""
        index = key % len(self.dataset)
        image, label = self._kept.get(index) or self.dataset.load(index)
        if self.cache:
            self._kept[index] = image, label
        return self.transform(image, label, np.random.default_rng([self.seed, key]))


class EvaluationView(Dataset[tuple[Tensor, Tensor, int]]):
    """A dataset's frames as they are, normalised."""

    def __init__(self, dataset: SegmentationDataset, data: DataConfig) -> None:
        self.dataset, self.data = dataset, data

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        """Image float32 `[1, 3, H, W]`, label int64 `[1, H, W]` and the index."""
        image, label = self.dataset.load(index)
        target = torch.from_numpy(label.astype(np.int64))
        return normalise(image, self.data.mean, self.data.std)[None], target[None], index


class _Loader(DataLoader[_Batch]):
    """A loader whose iteration raises a DataError of one line, in the process that iterates."""

    def __iter__(self) -> Iterator[_Batch]:  # type: ignore[override]
        iterator = _quietly(super().__iter__)
        try:
            yield from iterator
        except DataError as error:  # torch puts its worker's traceback before the message
            message = str(error.args[0]).strip().rpartition(f"{DataError.__qualname__}: ")[2]
            raise DataError(message) from None
        except MemoryError:
            raise DataError("no memory to read an image; lower data.workers") from None
        except (RuntimeError, ConnectionError, EOFError) as error:  # the last two: killed as it sent
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a data worker was killed, as happens where memory or shared memory runs out; lower "
                "data.workers"
            ) from None
        finally:  # now: what collects garbage waits for workers that no longer hear it, 5 s each
            getattr(iterator, "_shutdown_workers", lambda: None)()


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


def _loader(view: Dataset[Any], workers: int, **options: Any) -> DataLoader[Any]:
    return _Loader(
        view,
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
