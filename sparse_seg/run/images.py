"""What is asked of images before a network runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

LIKE_BYTES = 50  # value of an image that none has whose mean and std are of 0..1
MIN_SIZE = 32  # pixels; below it the coarsest stage has no cell left


def check_images(images: Tensor) -> None:
    """Raises a ValueError if images are not float `[B, 3, H, W]`, one or more, of `MIN_SIZE` or more."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a tensor [B, 3, H, W], not {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be float [B, 3, H, W], normalised; got {images.dtype} {list(images.shape)}"
        )
    if not len(images):
        raise ValueError(f"images must be one or more, not an empty batch {list(images.shape)}")
    if min(images.shape[2:]) < MIN_SIZE:
        raise ValueError(f"images must be at least {MIN_SIZE}x{MIN_SIZE} px, not {list(images.shape[2:])}")


def check_dtype(images: Tensor, tensors: Iterable[Tensor]) -> None:
    """Raises a ValueError if images are of another dtype than a network's tensors, and autocast is off."""
    own = next((one.dtype for one in tensors if one.is_floating_point()), images.dtype)
    if images.dtype != own and not torch.is_autocast_enabled(images.device.type):
        raise ValueError(f"images are {images.dtype} and the network is {own}; pass images.to({own})")


def warn_of_bytes(images: Tensor) -> None:
    """On the CPU, warn of values that look like bytes: none negative, some far above a normalised image's."""
    # elsewhere a look at the values would wait for the device; compiled, it would cut the graph
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (value.item() for value in images.detach().aminmax())
        if low >= 0 and high > LIKE_BYTES:
            warnings.warn(
                f"images reach {high:g} and are nowhere negative: they look like 0..255; normalise them: "
                "(images / 255 - mean) / std",
                stacklevel=2,
            )
