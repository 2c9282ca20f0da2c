"""Recalibrate the batch statistics of a trained network for another way to run it."""

from __future__ import annotations

import torch
from torch import nn

from sparse_seg.config import Config
from sparse_seg.data import build_dataset
from sparse_seg.data.batches import training_batches
from sparse_seg.errors import ConfigError
from sparse_seg.run.segmentor import Segmentor
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.progress import bar
from sparse_seg.training.batch import check_values_per_channel

BATCHES = 50  # enough for means of thousands of sites


@torch.no_grad()
def recalibrate_batch_norm(model: Segmentor, config: Config, network: str, batches: int = BATCHES) -> None:
    """Recompute the running statistics of every batch norm from training batches, in place.

    Means over whole batches instead of a moving average ("Precise BN": Wu and Johnson, "Rethinking Batch in
    BatchNorm", 2021). Weights stay as they are.

    Args:
        config: gives dataset, crops, batch size and seed; samples are the first of the training.
        network: `dense`, at the config's output stride, or `selective`, with masks by the model's policy.

    Raises:
        DataError: the dataset is incomplete.
        ConfigError: a norm would see one value per channel, or a network that was captured.
    """
    if not isinstance(model, SelectiveNetwork):
        raise ConfigError("batch norms are recalibrated of sparse_seg's own networks, not of model.module")
    check_values_per_channel(config, config.train.batch_size)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    device = model.device
    dataset = build_dataset(config.data.dataset, config.data.root, "train", config.data.bits)
    loader = training_batches(dataset, config, 0, batches)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean of all batches
    model.eval()  # dropout stays off
    for images, _ in bar(loader, f"statistics, {network}"):
        images = images.to(device)
        run = model.start(images)
        fine_blocks = None if network == "dense" else model.policy(run)
        for norm in norms:
            norm.train()
        if fine_blocks is None:
            model.dense(images, config.train.output_stride or model.dense_stride)
        else:
            model(images, fine_blocks)
        for norm in norms:
            norm.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
