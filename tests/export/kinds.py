"""Small networks of every kind that can be exported, and how a graph of one is compared with the model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_seg import build_model
from sparse_seg.export import StaticNetwork
from sparse_seg.export.check import chosen_levels, random_inputs
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from tests import captured
from tests.reference import VARIANTS, randomise, relative_error

COMMON = {"depths": [1, 1, 1, 2], "width": 0.125, "head_channels": 16, "low_level_channels": 6}
COMMON |= {"num_classes": 5, "aspp_rates": [4, 8, 12]}
KINDS: dict[str, dict[str, Any]] = {
    "tiny": {"module": captured.NAME, "module_args": {"classes": 5}},  # whose graphs are soon made
    "lite": {},
    "deep": {"depths": [2, 2, 2, 2]},
    "resnet34": {"backbone": "resnet34", "depths": [1, 1, 2, 1], "head": "fcn"},
    "deeplabv3": {"head": "deeplabv3"},
    "plus": {"head": "deeplabv3plus", "aspp_separable": "normed", "separable": "normed", "decoder_convs": 2},
    "undilated": {"head": "deeplabv3", "dilate_second": False, "aspp_projection": False},
    "nearest": {"head": "deeplabv3", "exchange": "nearest", "shortcut": "avg_pool"},
    "none": {"exchange": "none", "shortcut": "avg_pool"},
    "8 16 32": {"head": "deeplabv3", "strides": [8, 16, 32], "shortcut": "avg_pool"},
    "8 16 32 nearest": {"strides": [8, 16, 32], "exchange": "nearest"},
    "4 8 16": {"backbone": "resnet50", "depths": [1, 1, 2, 2], "head": "deeplabv3", "strides": [4, 8, 16]},
}
KINDS |= {name: VARIANTS[name] for name in ("deep stem, pooled, separable", "smp's plus")}
POLICIES: dict[str, dict[str, Any]] = {
    "edge": {"policy": "edge"},
    "edge, cad": {"policy": "edge", "edge": "cad", "blur": True},
    "entropy": {"policy": "confidence"},
    "margin": {"policy": "confidence", "uncertainty": "margin", "reduce": "mean"},
    "boundary": {"policy": "confidence", "uncertainty": "boundary", "reduce": "mean", "neighbours": True},
    "learned": {"policy": "learned"},
    "gain": {"policy": "gain"},
}


@functools.cache
def kind_model(kind: str, policy: str = "edge", fraction: float = 0.3) -> SelectiveNetwork:
    """A network with random weights and statistics, in eval mode. Shared: do not change it."""
    torch.manual_seed(0)
    settings = KINDS[kind] if "module" in KINDS[kind] else COMMON | KINDS[kind]
    mask = POLICIES[policy] | {"fine_fraction": fraction, "middle_fraction": 0.3}
    model = build_model(settings | {"mask": mask})
    randomise(model)
    return model


def arrays(network: StaticNetwork, inputs: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    """Inputs by name, as runtimes take them."""
    return {name: value.numpy() for name, value in zip(network.interface()[0], inputs, strict=True)}


@torch.no_grad()
def compare(
    model: SelectiveNetwork,
    network: StaticNetwork,
    inputs: tuple[Tensor, ...],
    images: Tensor,
    found: Mapping[str, Tensor],
) -> None:
    """A graph's outputs are the model's: the same blocks; logits to 1e-5; classes but for ties."""
    mask = found.get("fine_blocks")
    if network.options.dense is not None:
        expected = model.dense(images, network.options.dense)
    else:
        assert mask is not None
        levels = chosen_levels(network, inputs, found)
        assert levels is not None
        expected = model.start(images).take(levels, Way(merge=network.merge)).logits()
        if network.choice is not None:
            chosen = model.classify(images)[1]
            assert chosen is not None
            assert torch.equal(mask, chosen if chosen.dtype == torch.bool else chosen == 2)
        else:
            given = torch.zeros(mask.flatten(1).shape, dtype=torch.bool).scatter(1, inputs[1], True)
            assert torch.equal(mask, given.view_as(mask))
    assert relative_error(found["logits"], expected) < 1e-5
    top = expected.topk(2, 1)
    clear = top.values[:, 0] - top.values[:, 1] > 1e-5 * expected.abs().max()
    assert torch.equal(found["classes"][clear].long(), top.indices[:, 0][clear])
    assert clear.float().mean() > 0.99


def cases(network: StaticNetwork, count: int) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Random inputs, and their images as the model takes them."""
    generator = torch.Generator().manual_seed(1)
    return [random_inputs(network, generator) for _ in range(count)]
