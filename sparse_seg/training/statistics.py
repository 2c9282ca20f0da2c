"""Recalibrate the batch statistics of a trained network for another way to run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sparse_seg.config import Config
from sparse_seg.data import open_split
from sparse_seg.data.batches import training_batches
from sparse_seg.ops.node import Node
from sparse_seg.ops.norm import COUNT
from sparse_seg.progress import bar
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.training.step import limits_named

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
        TrainingError: a norm would see one value per channel.
    """
    norms = [one for one in model.graph.nodes if one.op == "batch_norm" and not one.options.get("frozen")]
    for norm in norms:
        if COUNT in norm.tensors:
            model.tensors[norm.tensors[COUNT]].zero_()
    loader = training_batches(open_split(config.data, "train"), config, 0, batches)
    model.eval()  # dropout stays off
    for number, (images, _) in enumerate(bar(loader, f"statistics, {network}"), start=1):
        images = images.to(model.device)
        fine_blocks = None if network == "dense" else model.policy(model.start(images))
        with limits_named(), _averaging(model, norms, number):
            if fine_blocks is None:
                model.dense(images, config.train.output_stride or model.dense_stride)
            else:
                model(images, fine_blocks)


@contextmanager
def _averaging(model: SelectiveNetwork, norms: Sequence[Node], number: int) -> Iterator[None]:
    """The norms alone in training mode, their running statistics the means of batches 1 to `number`."""
    layers: dict[str, nn.Module] = dict(model.module.named_modules())
    trained = [model, *(layers[norm.layer] for norm in norms if norm.layer in layers)]
    momenta = [norm.options["momentum"] for norm in norms]
    for norm in norms:
        norm.options["momentum"] = 1 / number
    for layer in trained:
        layer.training = True
    try:
        yield
    finally:
        for layer in trained:
            layer.training = False
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.options["momentum"] = momentum
