"""A checkpoint and the data set that an experiment runs it on."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from sparse_seg.checkpoint import load, network_of
from sparse_seg.checkpoint.content import Checkpoint
from sparse_seg.config import Config, check_classes
from sparse_seg.data import SegmentationDataset, open_split
from sparse_seg.files import check_outputs
from sparse_seg.run.network import SelectiveNetwork


class Opened(NamedTuple):
    """A config, a checkpoint's content and network, and a split of the config's data set."""

    config: Config
    loaded: Checkpoint
    model: SelectiveNetwork
    dataset: SegmentationDataset
    split: str
    limit: int | None  # first images that are used


def open_checkpoint(
    config: Config,
    checkpoint: str | Path,
    device: torch.device | str,
    split: str = "val",
    limit: int | None = None,
    outputs: Sequence[str | Path] = (),
) -> Opened:
    """Open and check all that an experiment reads, the checkpoint before the data.

    Args:
        outputs: files to be written, none of which may be of the data set.

    Raises:
        CheckpointError, ConfigError, DataError, OverwriteError: what is wrong, in one line.
    """
    check_classes(config)
    loaded = load(checkpoint)
    model = network_of(loaded, config).to(device)
    dataset = open_split(config.data, split)
    check_outputs(outputs, dataset.files())
    dataset.check(limit)
    return Opened(config, loaded, model, dataset, split, limit)
