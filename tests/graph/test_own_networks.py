"""Our own networks, captured from their plain form: the numbers of their own code, which knows each layer.

Undilated convolutions and entries two cells apart are left out: there the graph puts the border between early
values and rows elsewhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparse_seg
from sparse_seg.models.plain import plain_network
from sparse_seg.run.way import Way
from tests.conversion.cases import randomise
from tests.reference import block_mask, relative_error

SETTINGS: dict[str, dict[str, Any]] = {
    "lite": {"backbone": "resnet18", "head": "lite"},
    "fcn": {"backbone": "resnet18", "head": "fcn"},
    "deeplabv3": {"backbone": "resnet50", "head": "deeplabv3"},
    "separable": {
        "backbone": "resnet18",
        "head": "deeplabv3",
        "aspp_separable": "normed",
        "separable": "linear",
    },
    "deeplabv3plus": {"backbone": "resnet18", "head": "deeplabv3plus"},
}


@pytest.mark.parametrize("name", SETTINGS)
@torch.no_grad()
def test_captured_is_the_same(name: str) -> None:
    settings = SETTINGS[name] | {
        "width": 0.125,
        "head_channels": 16,
        "num_classes": 5,
        "depths": [1, 1, 2, 2],
    }
    own: Any = randomise(sparse_seg.build_model(settings)).double()
    net = sparse_seg.selective(plain_network(own, 8).eval(), strides=(8, 16), size=(64, 128))
    size = (64, 96) if name == "deeplabv3plus" else (75, 98)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).double()
    mask = block_mask("random", (2, -(-size[0] // 16), -(-size[1] // 16)))
    merges = ("whole",) if name == "deeplabv3plus" else ("whole", "patch")
    ways = [Way(exchange=exchange) for exchange in ("linear", "nearest", "none")]
    for way in [*ways, *(Way(merge=merge) for merge in merges)]:
        found, expected = (model.start(images).take(mask, way).logits() for model in (net, own))
        assert relative_error(found, expected) < 1e-10, way.name
    for stride in (8, 16):
        assert relative_error(net.dense(images, stride), own.dense(images, stride)) < 1e-10


@pytest.mark.parametrize("strides", [(8, 16, 32), (4, 8, 16)], ids=str)
@pytest.mark.parametrize("head", ["lite", "fcn", "deeplabv3", "deeplabv3plus"])
@torch.no_grad()
def test_three_strides(head: str, strides: tuple[int, ...]) -> None:
    settings = {
        "backbone": "resnet18",
        "head": head,
        "width": 0.125,
        "head_channels": 16,
        "num_classes": 5,
    }
    own: Any = randomise(sparse_seg.build_model(settings | {"strides": list(strides)})).double()
    net = sparse_seg.selective(plain_network(own, 8).eval(), strides=strides, size=(64, 128))
    images = torch.randn(2, 3, 96, 131, generator=torch.Generator().manual_seed(0)).double()
    shape = 2, -(-96 // strides[-1]), -(-131 // strides[-1])
    levels = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(1))
    for merge in ("whole",) if head == "deeplabv3plus" else ("whole", "patch"):
        found, expected = (one.start(images).take(levels, Way(merge=merge)).logits() for one in (net, own))
        assert relative_error(found, expected) < 1e-10, merge
    for stride in strides:
        assert relative_error(net.dense(images, stride), own.dense(images, stride)) < 1e-10
