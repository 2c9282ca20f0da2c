"""Blocks that a small trained net asks for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.masks.base import MaskPolicy

HIDDEN = 32  # channels; with 512 features at stride 8 under 0.4 % of a coarse DeepLabV3-ResNet-50


class LearnedPolicy(MaskPolicy):
    """A block's score is a net's logit; above 0 the net itself would make the block fine.

    It reads features of the last dense stage (stride 8; stride 4 where that is the finest), so the model runs
    it (`model.segment`). In eval it is deterministic, and cut like any policy: by a fraction or a threshold.

    Args:
        net: features `[B, C, h, w]` at the finest stride to scores `[B, 1, ceil(H/block), ceil(W/block)]`.
            `mask_net` makes the default; any other fits, so CAD's estimator too: its two logits (fine,
            coarse) become one score as the difference of its last convolution's two filters.
    """

    reads = "features"

    def __init__(
        self,
        fine_fraction: float | None = None,
        threshold: float | None = None,
        *,
        net: nn.Module,
        **levels: Any,
    ) -> None:
        super().__init__(fine_fraction, threshold, **levels)
        self.net = net

    def scores(self, images: Tensor, labels: Tensor | None) -> Tensor:
        raise ValueError(
            "the learned policy reads the network's features: call model(images), which runs it, or give "
            "fine_blocks"
        )

    def feature_scores(self, features: Tensor) -> Tensor:
        """Features `[B, C, h, w]` to scores `[B, Hc, Wc]`, in float32; differentiable."""
        return self.net(features).float().squeeze(1)


def mask_net(channels: int, factor: int, hidden: int = HIDDEN) -> nn.Sequential:
    """3x3 convolutions, as many of them strided as it takes from features to blocks `factor` cells wide."""
    layers: list[nn.Module] = []
    for _ in range(round(math.log2(factor))):
        layers += [nn.Conv2d(channels, hidden, 3, 2, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()]
        channels = hidden
    layers += [nn.Conv2d(hidden, hidden, 3, 1, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(hidden, 1, 1))


def straight_through(scores: Tensor) -> Tensor:
    """0 or 1 by the sign of scores with logistic noise, with the gradient of their sigmoid.

    The straight-through estimator (Bengio et al., 2013) of a Gumbel-softmax of two classes (Jang et al.,
    ICLR 2017), which CAD trains with too.
    """
    uniform = torch.rand_like(scores).clamp(1e-6, 1 - 1e-6)
    soft = (scores + uniform.log() - (1 - uniform).log()).sigmoid()
    return (soft > 0.5).to(soft) + (soft - soft.detach())
