"""Blocks that a small trained net asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.errors import ConfigError
from sparse_seg.masks.base import MaskPolicy, PolicyInput

HIDDEN = 32  # channels; with 512 features at stride 8 under 0.4 % of a coarse DeepLabV3-ResNet-50
CAD_HIDDEN = (128, 64, 64)  # channels of CAD's


class NetPolicy(MaskPolicy):
    """A policy whose scores a net makes."""

    needs_net = True

    def __init__(self, *cut: float | None, net: nn.Module, **levels: Any) -> None:
        super().__init__(*cut, **levels)
        self.net = net

    def macs(self, size: tuple[int, int], stride: int, batch: int) -> int:
        """Of the net's convolutions, one after the other, on features' grid."""
        total = 0
        for layer in self.net.modules():
            if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)) and layer.stride in (2, (2, 2)):
                size = -(-size[0] // 2), -(-size[1] // 2)
            if isinstance(layer, nn.Conv2d):
                total += batch * size[0] * size[1] * layer.weight.numel()
        return total


class LearnedPolicy(NetPolicy):
    """A block's score is a net's logit; above 0 the net itself would make the block fine.

    It reads features of the last dense stage (stride 8; stride 4 where that is the finest). In eval it is
    deterministic, and cut like any policy: by a fraction or a threshold.

    Args:
        net: features `[B, C, h, w]` at the finest stride to scores `[B, 1, ceil(H/block), ceil(W/block)]`.
            `mask_net` makes the default, `cad_mask_net` CAD's; any other fits.
    """

    @classmethod
    def make_net(
        cls, features: int, factor: int, classes: int, learned_net: Callable[..., nn.Module]
    ) -> nn.Module:
        return learned_net(features, factor)

    def scores(self, run: PolicyInput) -> Tensor:
        return self.net(run.features()).float().squeeze(1)


def mask_net(channels: int, factor: int, hidden: int = HIDDEN) -> nn.Sequential:
    """3x3 convolutions, as many of them strided as it takes from features to blocks `factor` cells wide."""
    layers: list[nn.Module] = []
    for _ in range(round(math.log2(factor))):
        layers += [nn.Conv2d(channels, hidden, 3, 2, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()]
        channels = hidden
    layers += [nn.Conv2d(hidden, hidden, 3, 1, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(hidden, 1, 1))


def cad_mask_net(channels: int, factor: int) -> nn.Sequential:
    """The mask net of CAD (Hesse et al., CVPRW 2023, code visinf/cad): 3x3 convolutions without norms.

    Its modules have CAD's names; `conversion/cad.py` makes one score of CAD's two logits. It reads layer2 and
    halves its grid, so its blocks are ours with strides 8 and 16. CAD pools whole 2x2 windows and runs even
    grids only; here a window at the border may be cut.

    Raises:
        ConfigError: blocks other than two cells wide.
    """
    if factor != 2:
        raise ConfigError(f"CAD's mask net scores blocks two cells wide, not {factor}: use strides [8, 16]")
    first, second, third = CAD_HIDDEN
    return nn.Sequential(
        nn.Conv2d(channels, first, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.Conv2d(second, third, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(third, 1, 3, padding=1),
    )


def straight_through(scores: Tensor) -> Tensor:
    """0 or 1 by the sign of scores with logistic noise, with the gradient of their sigmoid.

    The straight-through estimator (Bengio et al., 2013) of a Gumbel-softmax of two classes (Jang et al.,
    ICLR 2017), which CAD trains with too.
    """
    uniform = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
    soft = (scores + uniform.log() - (1 - uniform).log()).sigmoid()
    return (soft > 0.5).to(soft) + (soft - soft.detach())
