"""The four stages' layouts for images: dense, or with the levels that a mask asks for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_seg.masks import block_shape
from sparse_seg.models.resnet import STAGE_STRIDES
from sparse_seg.sparse import SiteLayout

LIKE_BYTES = 50  # value of an image that none has whose mean and std are of 0..1
MIN_SIZE = 32  # pixels; below it the coarsest stage has no cell left


def dense_strides(output_stride: int) -> list[int]:
    """Strides of the four stages of a dense network.

    Raises:
        ValueError: an unknown output stride.
    """
    if output_stride not in STAGE_STRIDES:
        raise ValueError(f"output_stride must be 4, 8, 16 or 32, not {output_stride}")
    return [min(stride, output_stride) for stride in STAGE_STRIDES]


def dense_layout(images: Tensor, stride: int) -> SiteLayout:
    """A site at every cell of the images' grid at `stride` px."""
    return SiteLayout(images.shape[0], _grid_size(images, stride), stride, device=images.device)


def dense_layouts(images: Tensor, output_stride: int) -> list[SiteLayout]:
    """Layouts of the four stages of the plain dense network.

    Raises:
        ValueError: images of a wrong shape or dtype, or an unknown stride.
    """
    check_images(images)
    strides = dense_strides(output_stride)
    layouts = {stride: dense_layout(images, stride) for stride in strides}
    return [layouts[stride] for stride in strides]


def selective_layouts(images: Tensor, fine_blocks: Tensor, strides: Sequence[int]) -> list[SiteLayout]:
    """Layouts of the four stages: each on its natural stride, but at most the coarsest of `strides`, with the
    finer levels that the mask asks for; stages above the finest stride are dense.

    Args:
        fine_blocks: bool or int64 `[B, Hc, Wc]`, see `SelectiveSegmentor.forward`.

    Raises:
        ValueError: images or mask of a wrong shape or dtype.
    """
    check_images(images)
    splits = _splits(images, fine_blocks, strides)
    finest, coarsest = strides[0], strides[-1]
    layouts: dict[int, SiteLayout] = {}
    for stride in sorted({min(stride, coarsest) for stride in STAGE_STRIDES}):
        layouts[stride] = dense_layout(images, stride)
        if stride > finest:
            size, coarser = _grid_size(images, finest), strides[::-1].index(stride)
            layouts[stride] = SiteLayout(images.shape[0], size, finest, splits[coarser:])
    return [layouts[min(stride, coarsest)] for stride in STAGE_STRIDES]


def _splits(images: Tensor, fine_blocks: Tensor, strides: Sequence[int]) -> list[Tensor]:
    """Which cells of each grid but the finest gain the next one's sites, coarsest grid first."""
    expected, levels = block_shape(images, strides[-1]), len(strides) - 1
    if tuple(fine_blocks.shape) != expected or fine_blocks.dtype not in (torch.bool, torch.int64):
        raise ValueError(
            f"fine_blocks must be bool or int64 levels {list(expected)} for images {list(images.shape)}, "
            f"not {fine_blocks.dtype} {list(fine_blocks.shape)}"
        )
    blocks = fine_blocks.to(images.device)
    if blocks.dtype == torch.int64 and not bool(((blocks >= 0) & (blocks <= levels)).all()):
        raise ValueError(f"levels must lie in 0..{levels} for the strides {list(strides)}")
    splits = []
    for level, stride in enumerate(strides[:0:-1]):
        height, width = _grid_size(images, stride)
        split = blocks if blocks.dtype == torch.bool else blocks > level
        if level:
            split = split.repeat_interleave(2**level, 1).repeat_interleave(2**level, 2)
        splits.append(split[:, :height, :width])
    return splits


def _grid_size(images: Tensor, stride: int) -> tuple[int, int]:
    return -(-images.shape[2] // stride), -(-images.shape[3] // stride)


def check_images(images: Tensor) -> None:
    """Raises a ValueError if images are not float `[B, 3, H, W]`, one or more, of `MIN_SIZE` or more."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be float [B, 3, H, W], normalised; got {images.dtype} {list(images.shape)}"
        )
    if not len(images):
        raise ValueError(f"images must be one or more, not an empty batch {list(images.shape)}")
    if min(images.shape[2:]) < MIN_SIZE:
        raise ValueError(f"images must be at least {MIN_SIZE}x{MIN_SIZE} px, not {list(images.shape[2:])}")


def warn_of_bytes(images: Tensor) -> None:
    """On the CPU, warn of values that look like bytes: none negative, some far above a normalised image's."""
    if images.device.type == "cpu":  # elsewhere a look at the values would wait for the device
        low, high = (value.item() for value in images.detach().aminmax())
        if low >= 0 and high > LIKE_BYTES:
            warnings.warn(
                f"images reach {high:g} and are nowhere negative: they look like 0..255; normalise them: "
                "(images / 255 - mean) / std",
                stacklevel=2,
            )
