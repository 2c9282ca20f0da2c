"""A small network of the usual form; tests override parts of it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


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


class Gated(Toy):
    """An early value is gated by what is computed from it."""

    def forward(self, images: Tensor) -> Tensor:
        early = self.stem[:3](images)
        gate = self.body(images).mean((2, 3), keepdim=True).sigmoid()
        return self.head(self.d(self.b(self.stem[5](self.stem[3](early * gate)))))
