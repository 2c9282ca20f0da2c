"""Networks from outside, captured, for tests of their exported files: small ones with what light networks are
made of, and torchvision's."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg import selective
from sparse_seg.run.network import SelectiveNetwork
from tests.export.kinds import POLICIES
from tests.peers import package

SIZE = (64, 128)  # px, of the images that networks are captured with


def conv(inside: int, out: int, kernel: int = 1, act: Any = nn.ReLU, **options: Any) -> nn.Sequential:
    """A convolution with a norm and an activation."""
    options.setdefault("padding", options.get("dilation", 1) * (kernel // 2))
    return nn.Sequential(
        nn.Conv2d(inside, out, kernel, bias=False, **options), nn.BatchNorm2d(out), act(inplace=True)
    )


class Excite(nn.Module):
    """Squeeze-and-excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class Inverted(nn.Module):
    """MobileNetV3's block, with a residual."""

    def __init__(self, channels: int, kernel: int, dilation: int, act: Any = nn.Hardswish) -> None:
        super().__init__()
        wide = 3 * channels
        self.expand = conv(channels, wide, act=act)
        self.depthwise = conv(wide, wide, kernel, act, groups=wide, dilation=dilation)
        self.excite, self.project = Excite(wide), conv(wide, channels, act=nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.excite(self.depthwise(self.expand(x))))


class ASPP(nn.Module):
    """Two atrous branches, a 1x1 and the image's mean."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.point, self.pool = conv(channels, width), conv(channels, width)
        self.atrous = nn.ModuleList(conv(channels, width, 3, dilation=rate) for rate in (2, 4))
        self.project = conv(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([self.point(x), *(one(x) for one in self.atrous), pooled], 1))


class Light(nn.Module):
    """Images to logits at their size, by way of output stride 8.

    Args:
        head: `aspp`, or `low`: joins an early grid at stride 4 behind an upsampling.
    """

    def __init__(self, head: str = "aspp", groups: int = 1, padding: int = 1, align: bool = False) -> None:
        super().__init__()
        self.padding, self.align, self.head = padding, align, head
        self.stem = conv(3, 8, 3, nn.Hardswish, stride=2, padding=padding)
        self.down = nn.Sequential(conv(8, 12, 3, nn.ReLU6, stride=2), conv(12, 16, 3, nn.SiLU, stride=2))
        self.body = nn.Sequential(
            conv(16, 24, 3, groups=4, dilation=2),
            Inverted(24, 3, 2),
            Inverted(24, 5, 2),
            conv(24, 24, 3, groups=groups, dilation=4),
        )
        self.neck = ASPP(24, 16) if head == "aspp" else conv(24, 16)
        self.low, self.classifier = nn.Conv2d(12, 5, 1), nn.Conv2d(16, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = images if self.padding else F.pad(images, (0, 1, 0, 1))
        low = self.down[0](self.stem(x))
        logits = self.classifier(self.neck(self.body(self.down[1](low))))
        options: dict[str, Any] = {"mode": "bilinear", "align_corners": self.align}
        if self.head == "low":
            logits = self.low(low) + F.interpolate(logits, size=low.shape[2:], **options)
        return F.interpolate(logits, size=images.shape[2:], **options)


class Mixing(nn.Module):
    """A convolution that mixes phases between two that do not (`Geometry.mixing`)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*(conv(a, b, 3, stride=2) for a, b in ((3, 6), (6, 8), (8, 12))))
        self.body = nn.Sequential(*(conv(12, 12, 3, dilation=d) for d in (2, 1, 2)), nn.Conv2d(12, 5, 1))

    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(self.body(self.stem(images)), size=images.shape[2:], mode="bilinear")


NETWORKS: dict[str, Any] = {
    "aspp": Light,
    "low level": lambda: Light("low"),
    "corners": lambda: Light(align=True),
    "same padding": lambda: Light(padding=0),
    "depthwise spread": lambda: Light(groups=24),
    "mixing": Mixing,
    "light 8 16 32": Light,
    "lraspp": lambda: package("torchvision.models.segmentation").lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5
    ),
}
STRIDES = {"light 8 16 32": (8, 16, 32), "lraspp": (16, 32)}


@functools.cache
def captured(name: str, policy: str = "edge", fraction: float = 0.3) -> SelectiveNetwork:
    """A network with random weights and statistics, in eval mode. Shared: do not change it."""
    torch.manual_seed(0)
    module = NETWORKS[name]()
    for key, tensor in module.state_dict().items():  # a norm's are vectors
        if key.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1)
        elif key.endswith("running_var") or tensor.ndim == 1:
            tensor.uniform_(0.7, 1.3)
    network = selective(
        module.eval(), STRIDES.get(name, (8, 16)), POLICIES[policy]["policy"], fraction, size=SIZE
    )
    return network.eval()
