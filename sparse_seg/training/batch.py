"""Checks of a training's batch before it starts."""

from __future__ import annotations

import math

import torch

from sparse_seg.config import Config
from sparse_seg.errors import ConfigError, TrainingError
from sparse_seg.processes import Processes
from sparse_seg.registry import POOLING_HEADS
from sparse_seg.run.network import SelectiveNetwork


def check_batch(
    config: Config, processes: Processes, device: torch.device, model: SelectiveNetwork | None = None
) -> None:
    """
    Args:
        model: the network, once it is built; what the norms of a module see is known only then.

    Raises:
        TrainingError: a batch cannot be shared equally.
        ConfigError: a batch norm would see one value per channel.
    """
    batch_size, count = config.train.batch_size, processes.count
    if batch_size % count:
        raise TrainingError(
            f"train.batch_size {batch_size} cannot be shared by {count} processes; use a multiple"
        )
    if config.model.module is not None and model is None:
        return
    synchronised = count > 1 and device.type == "cuda"
    check_values_per_channel(config, batch_size if synchronised else batch_size // count, model)


def check_values_per_channel(config: Config, images: int, model: SelectiveNetwork | None = None) -> None:
    """A batch norm in training needs two values per channel or more.

    Args:
        images: that a norm sees at once.
        model: the network, once it is built.

    Raises:
        ConfigError: it gets one.
    """
    train, settings = config.train, config.model
    coarsest = settings.own_strides[-1] if model is None else model.strides[-1]
    dense = train.output_stride or (8 if model is None else model.dense_stride)
    strides = [dense if train.network == "dense" else coarsest]
    if train.freeze:
        strides = []
    if settings.mask.policy == "learned":  # its net has a value per block
        strides.append(coarsest)
    pools = settings.head in POOLING_HEADS if model is None else model.norms_vectors
    pools = pools and not train.freeze
    deepest = max(strides)
    cells = math.prod(math.ceil(side / deepest) for side in config.data.crop)
    if images > 1 or (cells > 1 and not pools):
        return
    cause = (
        f"{settings.module or settings.head} pools each image to one value"
        if pools
        else f"data.crop {config.data.crop} is one cell at stride {deepest}"
    )
    raise ConfigError(
        f"train.batch_size {train.batch_size} gives each process one image, and {cause}, where a batch norm "
        "learns nothing; raise train.batch_size" + ("" if pools else " or data.crop")
    )
