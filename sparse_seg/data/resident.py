"""Training frames that stay on a device, and are augmented there: for a GPU with few processor cores."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.data.dataset import IGNORE_INDEX, SegmentationDataset
from sparse_seg.data.loader import ResumableSampler
from sparse_seg.data.transforms import LUMA, Draw, TrainTransform
from sparse_seg.errors import DataError
from sparse_seg.progress import bar


class ResidentBatches:
    """The batches of a `training_loader`, cut from frames on `device`: the same crops, but for rounding.

    Iterating gives float32 `[B, 3, h, w]` and int64 `[B, h, w]` on the device. A GB holds 1500 frames of
    360x480.

    Raises:
        DataError: an image cannot be read, the frames differ in size, or the device has no room for them.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: TrainTransform,
        keys: ResumableSampler,
        seed: int,
        device: torch.device,
    ) -> None:
        self.transform, self.keys, self.seed, self.device = transform, keys, seed, device
        frames = [dataset.load(index) for index in bar(range(len(dataset)), "reading frames")]
        sizes = {label.shape for _, label in frames}
        if len(sizes) > 1:
            small, large = min(sizes), max(sizes)
            raise DataError(
                f"frames of {small[0]}x{small[1]} and {large[0]}x{large[1]} px cannot be kept on the device "
                "together; set data.on_device=false"
            )
        try:
            self.images = torch.stack([_channels_first(image) for image, _ in frames]).to(device)
            self.labels = torch.stack([torch.from_numpy(label) for _, label in frames]).to(device)
        except torch.OutOfMemoryError:
            raise DataError(
                f"{device} has no room for {len(frames)} frames; set data.on_device=false"
            ) from None
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
            for values in (transform.mean, transform.std)
        )

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        total, height, width = self.labels.shape
        for keys in self.keys:
            draws = [
                self.transform.draw(height, width, np.random.default_rng([self.seed, key])) for key in keys
            ]
            yield self._crops(torch.tensor([key % total for key in keys]), draws)

    def _crops(self, indices: Tensor, draws: list[Draw]) -> tuple[Tensor, Tensor]:
        """The frames' crops, as `TrainTransform` makes them."""
        warp, exponent, colour, middle = (
            torch.from_numpy(np.array(values, np.float32)).to(self.device, non_blocking=True)
            for values in zip(*draws, strict=True)
        )
        indices = indices.to(self.device, non_blocking=True)
        grid = self._grid(warp)
        fill = 255 * self.mean
        pixels = _sample(self.images[indices] - fill, grid, "bilinear") + fill
        if self.transform.gamma:
            pixels = 255 * (pixels / 255).clamp(0, 1) ** exponent[:, None, None, None]
        if self.transform.jitter:
            luma = pixels.mean((2, 3)) @ torch.tensor(LUMA, dtype=torch.float32, device=self.device)
            pixels = torch.einsum("bij,bjhw->bihw", colour, pixels) + (middle * luma)[:, None, None, None]
            pixels = pixels.clamp(0, 255)
        labels = self.labels[indices, None].float() - IGNORE_INDEX
        labels = _sample(labels, grid, "nearest")[:, 0] + IGNORE_INDEX
        return (pixels / 255 - self.mean) / self.std, labels.round().long()

    def _grid(self, warp: Tensor) -> Tensor:
        """Places of a crop's pixels in the image, `[B, h, w, 2]` in -1..1 for `grid_sample`."""
        height, width = self.labels.shape[1:]
        y, x = (torch.arange(side, dtype=torch.float32, device=self.device) for side in self.transform.crop)
        pixels = torch.stack([*torch.meshgrid(x, y, indexing="xy"), x.new_ones(y.numel(), x.numel())], -1)
        places = pixels @ warp[:, None].transpose(-1, -2)
        return (2 * places + 1) / torch.tensor([width, height], device=self.device) - 1


def _channels_first(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _sample(grids: Tensor, places: Tensor, mode: str) -> Tensor:
    return F.grid_sample(grids, places, mode=mode, padding_mode="zeros", align_corners=False)
