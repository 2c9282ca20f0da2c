"""Checks of a training's batch before it starts."""

from __future__ import annotations

import math

import torch

from sparse_seg.config import Config
from sparse_seg.errors import ConfigError, TrainingError
from sparse_seg.processes import Processes
from sparse_seg.registry import POOLING_HEADS


def check_batch(config: Config, processes: Processes, device: torch.device) -> None:
    """
    Raises:
        TrainingError: a batch cannot be shared equally.
        ConfigError: a batch norm would see one value per channel.
    """
    batch_size, count = config.train.batch_size, processes.count
    if batch_size % count:
        raise TrainingError(
            f"train.batch_size {batch_size} cannot be shared by {count} processes; use a multiple"
        )
    synchronised = count > 1 and device.type == "cuda"
    check_values_per_channel(config, batch_size if synchronised else batch_size // count)


def check_values_per_channel(config: Config, images: int) -> None:
    """A batch norm in training needs two values per channel or more.

    Args:
        images: that a norm sees at once.

    Raises:
        ConfigError: it gets one.
    """
    train, model = config.train, config.model
    strides = [train.output_stride if train.network == "dense" else model.strides[-1]]
    if train.freeze:
        strides = []
    if model.mask.policy == "learned":  # its net has a value per block
        strides.append(model.strides[-1])
    pools = model.head in POOLING_HEADS and not train.freeze
    deepest = max(strides)
    cells = math.prod(math.ceil(side / deepest) for side in config.data.crop)
    if images > 1 or (cells > 1 and not pools):
        return
    cause = (
        f"{model.head} pools each image to one value"
        if pools
        else f"data.crop {config.data.crop} is one cell at stride {deepest}"
    )
    raise ConfigError(
        f"train.batch_size {train.batch_size} gives each process one image, and {cause}, where a batch norm "
        "learns nothing; raise train.batch_size" + ("" if pools else " or data.crop")
    )
