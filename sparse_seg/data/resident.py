"""Training frames that stay on a device, and are augmented there: for a GPU with few processor cores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.data.dataset import IGNORE_INDEX, SegmentationDataset
from sparse_seg.data.sampler import ResumableSampler
from sparse_seg.data.transforms import LUMA, TrainTransform, require_bytes
from sparse_seg.errors import DataError, out_of_memory
from sparse_seg.progress import bar


@dataclass(eq=False)
class ResidentBatches:
    """The batches that a loader would give, cut from frames on `device`: the same crops, but for rounding.

    Iterating reads all frames first, then gives float32 `[B, 3, h, w]` and int64 `[B, h, w]` on the device.
    A GB holds 1500 frames of 360x480. It raises a DataError where an image cannot be read, the frames differ
    in size, or there is no room.
    """

    dataset: SegmentationDataset
    transform: TrainTransform
    keys: ResumableSampler
    device: torch.device

    def __post_init__(self) -> None:
        self.mean, self.std, self.luma = (
            torch.tensor(values, dtype=torch.float32, device=self.device)[:, None, None]
            for values in (self.transform.data.mean, self.transform.data.std, LUMA.tolist())
        )

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            images, labels = self._frames()
            for keys in self.keys:
                yield self._crops(images, labels, keys)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise DataError(
                f"no room for {len(self.dataset)} frames and their crops on {self.device}; set "
                "data.on_device=false, or lower train.batch_size"
            ) from None

    def _frames(self) -> tuple[Tensor, Tensor]:
        """All frames, uint8: images `[N, 3, H, W]` and labels `[N, H, W]`."""
        total, first = len(self.dataset), self.dataset.load(0)[1].shape
        images = torch.empty(total, 3, *first, dtype=torch.uint8, device=self.device)
        labels = torch.empty(total, *first, dtype=torch.uint8, device=self.device)
        for index in bar(range(total), "reading frames", shown=self.keys.part[0] == 0):
            image, label = self.dataset.load(index)
            require_bytes(image)
            if label.shape != first:
                sizes = "{}x{} px and {} {}x{}".format(*first, self.dataset.name(index), *label.shape)
                raise DataError(
                    f"only frames of one size can be kept on a device, but {self.dataset.name(0)} has {sizes}"
                    "; set data.on_device=false"
                )
            images[index] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
            labels[index] = torch.from_numpy(label)
        return images, labels

    def _crops(self, images: Tensor, labels: Tensor, keys: list[int]) -> tuple[Tensor, Tensor]:
        """The keys' crops, as `TrainTransform` makes them."""
        total, height, width = labels.shape
        rngs = (np.random.default_rng([self.keys.seed, key]) for key in keys)
        draws = [self.transform.draw(height, width, rng) for rng in rngs]
        warp, exponent, colour, luma_share = (
            self._sent(np.array(values, np.float32)) for values in zip(*draws, strict=True)
        )
        chosen = self._sent(np.array(keys) % total)
        places, fill = self._places(warp, height, width), 255 * self.mean
        pixels = _sample(images[chosen] - fill, places, "bilinear") + fill
        pixels = 255 * (pixels / 255).clamp(0, 1) ** exponent[:, None, None, None]
        luma = (pixels.mean((2, 3), keepdim=True) * self.luma).sum(1, keepdim=True)
        pixels = torch.einsum("bij,bjhw->bihw", colour, pixels) + luma_share[:, None, None, None] * luma
        targets = _sample(labels[chosen, None].float() - IGNORE_INDEX, places, "nearest")[:, 0] + IGNORE_INDEX
        return (pixels.clamp(0, 255) / 255 - self.mean) / self.std, targets.round().long()

    def _sent(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def _places(self, warp: Tensor, height: int, width: int) -> Tensor:
        """Where a crop's pixels lie in the image: `[B, h, w, 2]` in -1..1, for `grid_sample`."""
        crop = self.transform.data.crop
        rows, columns = (torch.arange(side, dtype=torch.float32, device=self.device) for side in crop)
        places = []  # x, then y; not by a matrix product, which may be TF32's
        for row, length in zip(warp.unbind(1), (width, height), strict=True):
            along, across, offset = row[..., None, None].unbind(1)
            places.append((2 * (along * columns + across * rows[:, None] + offset) + 1) / length - 1)
        return torch.stack(places, -1)


def _sample(grids: Tensor, places: Tensor, mode: str) -> Tensor:
    return F.grid_sample(grids, places, mode=mode, padding_mode="zeros", align_corners=False)
