"""Atrous spatial pyramid pooling (Chen et al., 2017), by torchvision's names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ASPP(nn.Module):
    """A 1x1 branch, 3x3 branches with wide dilations, image pooling; then a 1x1 projection of all.

    Args:
        inside, channels: of the input and of each branch.
        dilations: of the 3x3 branches.
        separable: of the 3x3 branches: `none`; `linear`, depthwise and 1x1; `normed`, with norm and ReLU
            between the two (Chen et al., ECCV 2018).
        projection: without it the output is the branches side by side (mmsegmentation projects by a 3x3).
    """

    def __init__(
        self,
        inside: int,
        channels: int,
        dilations: Sequence[int],
        separable: str = "none",
        projection: bool = True,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        pooling = conv_norm_relu(inside, channels, 1)
        self.convs = nn.ModuleList(
            [
                conv_norm_relu(inside, channels, 1),
                *(_atrous(inside, channels, dilation, separable) for dilation in dilations),
                nn.Sequential(nn.AdaptiveAvgPool2d(1), *pooling),
            ]
        )
        self.out_channels = channels if projection else channels * len(self.convs)
        self.project = nn.Sequential()
        if projection:
            joined = conv_norm_relu(channels * len(self.convs), channels, 1)
            self.project = nn.Sequential(*joined, nn.Dropout(dropout))

    def forward(self, grid: Tensor) -> Tensor:
        """`[B, inside, H, W]` to `[B, out_channels, H, W]`."""
        *local, pooling = self.convs
        pooled = pooling(grid).expand(-1, -1, *grid.shape[2:])
        return self.project(torch.cat([*(branch(grid) for branch in local), pooled], 1))


def _atrous(inside: int, channels: int, dilation: int, separable: str) -> nn.Sequential:
    if separable == "none":
        return conv_norm_relu(inside, channels, 3, dilation)
    first, *others = separated(inside, channels, dilation, separable)
    last = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return nn.Sequential(nn.Sequential(first, *others), *last)


def separated(inside: int, channels: int, dilation: int, separable: str) -> list[nn.Module]:
    """Depthwise 3x3 and 1x1; `normed`: with norm and ReLU between the two."""
    depthwise = nn.Conv2d(inside, inside, 3, 1, dilation, dilation, groups=inside, bias=False)
    between = [nn.BatchNorm2d(inside), nn.ReLU(inplace=True)] if separable == "normed" else []
    return [depthwise, *between, nn.Conv2d(inside, channels, 1, bias=False)]


def conv_norm_relu(
    inside: int, channels: int, kernel: int, dilation: int = 1, separable: str = "none"
) -> nn.Sequential:
    """A convolution that keeps its size, or the depthwise and 1x1 ones that stand for it; norm; ReLU."""
    if separable == "none":
        padding = kernel // 2 * dilation
        layers: list[nn.Module] = [nn.Conv2d(inside, channels, kernel, 1, padding, dilation, bias=False)]
    else:
        layers = separated(inside, channels, dilation, separable)
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
