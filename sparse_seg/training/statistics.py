"""Recalibrate the batch statistics of a trained network for another way to run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sparse_seg.config import Config
from sparse_seg.data import open_split
from sparse_seg.data.batches import training_batches
from sparse_seg.ops.norm import COUNT
from sparse_seg.progress import bar
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.training.batch import check_values_per_channel

BATCHES = 50  # enough for means of thousands of sites


@torch.no_grad()
def recalibrate_batch_norm(
    model: SelectiveNetwork, config: Config, network: str, batches: int = BATCHES
) -> None:
    """Recompute the running statistics of every batch norm from training batches, in place.

    Means over whole batches instead of a moving average ("Precise BN": Wu and Johnson, "Rethinking Batch in
    BatchNorm", 2021). Weights stay as they are.

    Args:
        config: gives dataset, crops, batch size and seed; samples are the first of the training.
        network: `dense`, at the config's output stride, or `selective`, with masks by the model's policy.

    Raises:
        DataError: the dataset is incomplete.
        ConfigError: a norm would see one value per channel.
    """
    check_values_per_channel(config, config.train.batch_size, model)
    norms = [one for one in model.graph.nodes if one.op == "batch_norm" and not one.options.get("frozen")]
    layers, tensors, device = dict(model.module.named_modules()), model.tensors, model.device
    rest: dict[str, float] = {}  # of running statistics: what is left of old ones after a batch
    for norm in norms:
        for role in ("running_mean", "running_var"):
            name, momentum = norm.tensors[role], norm.options["momentum"] or 1.0
            rest[name] = rest.get(name, 1.0) * (1 - momentum)  # a norm may run more than once
    counts = {norm.tensors[COUNT] for norm in norms if COUNT in norm.tensors}
    totals = {name: torch.zeros_like(tensors[name]) for name in rest}
    dataset = open_split(config.data, "train")
    loader = training_batches(dataset, config, 0, batches)
    model.eval()  # dropout stays off
    for number, (images, _) in enumerate(bar(loader, f"statistics, {network}"), start=1):
        images = images.to(device)
        fine_blocks = None if network == "dense" else model.policy(model.start(images))
        for name in (*rest, *counts):
            tensors[name].zero_()
        with _training(model, [layers[norm.layer] for norm in norms if norm.layer in layers]):
            if fine_blocks is None:
                model.dense(images, config.train.output_stride or model.dense_stride)
            else:
                model(images, fine_blocks)
        for name, left in rest.items():
            totals[name] += tensors[name] / (1 - left)
            tensors[name].copy_(totals[name] / number)
        for name in counts:
            tensors[name].fill_(number)


@contextmanager
def _training(model: SelectiveNetwork, norms: Sequence[nn.Module]) -> Iterator[None]:
    """The norms alone in training mode."""
    for layer in (model, *norms):
        layer.training = True
    try:
        yield
    finally:
        for layer in (model, *norms):
            layer.training = False
