"""A network of someone else's, small; `tests.captured:build` names it in configs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "tests.captured:build"


def conv(channels: int, out: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, dilation, dilation, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


class Net(nn.Module):
    """Output stride 8; dilation in place of further strides. It pools no image, so that P2 is exact."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.early = nn.Sequential(conv(3, width, 2), conv(width, width, 2), conv(width, 2 * width, 2))
        self.late = nn.Sequential(conv(2 * width, 2 * width, 1, 2), conv(2 * width, 2 * width, 1, 4))
        self.drop, self.head = nn.Dropout(0.1), nn.Conv2d(2 * width, classes, 1)
        self.auxiliary = nn.Conv2d(2 * width, classes, 1)  # of which a graph knows nothing
        self.register_buffer("scale", torch.full((1, 2 * width, 1, 1), 1.5), persistent=False)

    def forward(self, images: Tensor) -> Any:
        features = self.late(self.early(images)) * self.scale
        logits = self.head(self.drop(features))
        return {"out": F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)}


class Mixing(Net):
    """Goes back to 8 px between dilated convolutions, which mixes phases."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__(classes, width)
        self.late.insert(1, conv(2 * width, 2 * width))


def build(classes: int = 3, width: int = 4, mixing: bool = False) -> Net:
    return (Mixing if mixing else Net)(classes, width)


def trained(classes: int = 3, mixing: bool = False) -> Net:
    """With statistics of its own, in eval mode."""
    torch.manual_seed(0)
    network = build(classes, mixing=mixing)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return network.eval()
