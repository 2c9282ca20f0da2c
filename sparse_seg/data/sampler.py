"""Which frames a training's batches hold, as the seed and the position say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


@dataclass(eq=False)
class ResumableSampler(Sampler[list[int]]):
    """Batches of keys for `TrainingView`, cut from an endless stream of epochs, each newly shuffled.

    A batch may cross from one epoch to the next, so all have `batch_size` keys. Starting at
    `start_iteration` gives the batches that an unbroken run would give from there. `part` (i, n) gives the
    i-th of n parts of each batch.
    """

    length: int
    batch_size: int
    seed: int
    start_iteration: int
    iterations: int
    part: tuple[int, int] = (0, 1)

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
