"""One training in several processes, usually with a GPU each, as torchrun starts them.

Each process runs its share of every batch, and all step by the mean of their gradients, so that weights stay
the same everywhere. On GPUs batch norms see the whole batch (`SyncBatchNorm`); on CPUs, for which PyTorch has
none, they see their own process's share. The first process validates and writes the run's files.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_seg.config import Config
from sparse_seg.errors import ConfigError, TrainingError
from sparse_seg.registry import POOLING_HEADS

TIMEOUT = timedelta(hours=2)  # the others wait as long as the first validates
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class Processes:
    """This process's `rank` among `count`; with one process, everything below does nothing."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def check_batch(self, config: Config, device: torch.device) -> None:
        """
        Raises:
            TrainingError: a batch cannot be shared equally.
            ConfigError: a batch norm would see one value per channel.
        """
        batch_size = config.train.batch_size
        if batch_size % self.count:
            raise TrainingError(
                f"train.batch_size {batch_size} cannot be shared by {self.count} processes; use a multiple"
            )
        synchronised = self.count > 1 and device.type == "cuda"
        check_values_per_channel(config, batch_size if synchronised else batch_size // self.count)

    def seed(self, seed: int, iteration: int) -> None:
        """Seed this process differently from the first, which keeps torch's state."""
        if not self.is_first:
            sequence = np.random.SeedSequence([seed, iteration, self.rank])
            torch.manual_seed(int(sequence.generate_state(1)[0]))

    def share_norms(self, model: _Module, device: torch.device) -> _Module:
        """The model with batch norms that see the whole batch, where the device can."""
        if self.count == 1 or device.type != "cuda":
            return model
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a value over all processes, the same in each."""
        if self.count > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
            value /= self.count
        return value

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their mean over all processes; the same parameters have one in all."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, flat.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process. All wait for all here: for the first while it validates."""
        return flag if self.count == 1 else self.mean(torch.tensor(float(flag), device=device)).item() > 0


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


@contextmanager
def joined_processes(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that torchrun started, if it did; resolves `cuda` to this process's GPU.

    Raises:
        TrainingError: a GPU is named, or there are fewer of them than processes on this machine.
    """
    if not dist.is_torchelastic_launched():
        yield Processes(), device
        return
    if device.type == "cuda":
        if device.index is not None:
            raise TrainingError(f"torchrun gives each process its GPU: --device cuda, not {device}")
        number, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= found:
            raise TrainingError(f"{found} GPUs are fewer than processes: lower --nproc_per_node")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield Processes(dist.get_rank(), dist.get_world_size()), device
    dist.destroy_process_group()  # not on failure: others may be inside a collective; torchrun ends them
