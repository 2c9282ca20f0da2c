"""A small network of the usual form, parts of which tests override; and one with a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg import SelectiveNetwork, selective
from sparse_seg.graph import logits_of
from sparse_seg.run.way import Way
from tests.graph.layers import randomise
from tests.reference import relative_error


class Toy(nn.Module):
    """Output stride 8; `b` and `d` are dilated."""

    def __init__(self, classes: int = 5, **norm: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8, **norm), nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
        )  # fmt: skip
        self.a, self.norm = nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8, **norm)
        self.b, self.d = nn.Conv2d(8, 8, 3, 1, 2, 2), nn.Conv2d(8, 8, 3, 1, 2, 2)
        self.head = nn.Conv2d(8, classes, 1)

    def body(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(self.stem(images))))
        return F.relu(self.d(F.relu(self.b(x))))

    def forward(self, images: Tensor) -> Any:
        return F.interpolate(self.head(self.body(images)), images.shape[2:], mode="bilinear")


@torch.no_grad()
def check_module(
    module: nn.Module,
    strides: Sequence[int] | None = None,
    fine: float = 1e-12,
    size: tuple[int, int] = (64, 96),
) -> SelectiveNetwork:
    """Capture a module: dense at its own stride it gives the module's logits, and all fine the dense ones.

    Args:
        fine: tolerance of all fine; pooled vectors of rows read the lattice, see docs/method.md.
    """
    module = module.double().eval()
    network, images = selective(module, strides, size=(64, 64)), torch.randn(2, 3, *size).double()
    expected, run = logits_of(module(images)), network.start(images).follow(Way.dense(network.geometry.own))
    found = run.logits() if expected.shape[2:] == images.shape[2:] else run.grid_logits()
    assert relative_error(found, expected) < 1e-12
    blocks = (-(-length // network.strides[-1]) for length in size)
    levels = torch.full((2, *blocks), len(network.strides) - 1)
    assert relative_error(network(images, levels), network.dense(images, network.strides[0])) < fine
    return network


class Doing(Toy):
    """Runs `does(self, images)`; `parts` are added, or take the place of those of the name."""

    def __init__(self, does: Callable[[Any, Tensor], Any] = Toy.forward, **parts: Any) -> None:
        super().__init__()
        self.does = does
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, images: Tensor) -> Any:
        return self.does(self, images)


def conv(dilation: int = 1, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(8, 8, 3, stride, dilation, dilation)


class Decoder(nn.Module):
    """Output stride 8 by dilation, and a decoder at stride 4 that reads a skip, as DeepLabV3+'s.

    Args:
        nearest: how the decoder resizes.
        dip: whether another branch goes down to stride 16 behind the rows.
    """

    def __init__(
        self, align_corners: bool, skip: bool = True, nearest: bool = False, dip: bool = False
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 4, 1)
        self.down = nn.Conv2d(6, 8, 3, 2, 1)
        self.wide = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 4, 4), nn.ReLU()
        )
        self.refine = nn.Conv2d(8, 8, 3, 1, 1)
        self.skip = nn.Conv2d(6, 3, 1) if skip else None
        self.dip = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 11, 3, 2, 1)) if dip else None
        self.decode = nn.Sequential(
            nn.Conv2d(11, 8, 3, 1, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, 1, 1),
            nn.ReLU(),
        )
        self.classify = nn.Conv2d(8, 5, 1)
        self.align_corners, self.nearest = align_corners, nearest

    def forward(self, images: Tensor) -> Tensor:
        low = self.stem(images)
        rows = self.wide(self.down(low))
        x = self.refine(rows)
        if self.skip is not None:
            if self.nearest:
                x = F.interpolate(x, low.shape[2:])
            else:
                x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=self.align_corners)
            x = torch.cat([x, self.skip(low)], 1)
            if self.dip is not None:
                x = x + F.interpolate(self.dip(rows), low.shape[2:], mode="bilinear")
            x = self.decode(x)
        x = self.classify(x)
        return F.interpolate(x, images.shape[2:], mode="bilinear", align_corners=self.align_corners)


def decoding(strides: tuple[int, ...] = (8, 16), **settings: bool) -> SelectiveNetwork:
    """A `Decoder` with random statistics, in eval mode and float64."""
    torch.manual_seed(0)
    module = randomise(Decoder(**{"align_corners": False} | settings).double())
    return selective(module.eval(), strides=strides, size=(64, 128))
