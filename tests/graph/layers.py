"""Layers as data, the plain PyTorch module that they describe, and forms that real networks have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.run.network import SelectiveNetwork


@dataclass
class Layer:
    """A call.

    kind: `image`, `conv`, `max`, `avg`, `place` (each place by itself), `norm`, `mean`, `vector`, `resize`.
    stride: of its value as captured, px; 0 of a vector.
    kernel, dilation, step: of a window, (y, x). padding: places above and to the left, or `same`.
    before: what treats each place between padding and a convolution; padding is then outside of that.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    channels: int
    stride: int
    module: nn.Module | None = None
    call: Callable[..., Tensor] | None = None
    kernel: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    step: int = 1
    padding: Any = (0, 0)
    before: nn.Module | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def offsets(self, size: tuple[int, int], unit: int) -> tuple[list[int], list[int]]:
        """Where a window's taps lie, px, in images of `size` px, if its input stands at `unit` px."""
        both = []
        for axis in range(2):
            kernel, dilation = self.kernel[axis], self.dilation[axis]
            before = (
                self.padding[axis] if self.padding != "same" else _same(self, axis, -(-size[axis] // unit))[0]
            )
            both.append([(tap * dilation - before) * unit for tap in range(kernel)])
        return both[0], both[1]


def _same(layer: Layer, axis: int, length: int) -> tuple[int, int]:
    """TensorFlow's SAME padding."""
    extent = (layer.kernel[axis] - 1) * layer.dilation[axis] + 1
    missing = max((-(-length // layer.step) - 1) * layer.step + extent - length, 0)
    return missing // 2, missing - missing // 2


class Drawn(nn.Module):
    """The network that layers describe."""

    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = layers
        self.parts = nn.ModuleList(one.module for one in layers if one.module is not None)
        self.befores = nn.ModuleList(one.before for one in layers if one.before is not None)

    def forward(self, images: Tensor) -> Tensor:
        values = {"image": images}
        for layer in self.layers[1:]:
            values[layer.name] = self.run(layer, [values[name] for name in layer.inputs], images)
        return values[self.layers[-1].name]

    def run(self, layer: Layer, read: list[Tensor], images: Tensor) -> Tensor:
        if layer.kind == "conv":
            return self._conv(layer, read[0])
        if layer.kind == "mean":
            return F.adaptive_avg_pool2d(read[0], 1)
        if layer.kind == "resize":
            height, width = (-(-length // layer.stride) for length in images.shape[2:])
            mode = {"mode": "nearest"} if layer.options.get("nearest") else {
                "mode": "bilinear", "align_corners": layer.options["align_corners"]
            }  # fmt: skip
            return F.interpolate(read[0], size=(height, width), **mode)
        call = layer.call or layer.module
        assert call is not None
        return call(*read)

    def _conv(self, layer: Layer, x: Tensor) -> Tensor:
        if layer.padding == "same":
            (above, below), (left, right) = (_same(layer, axis, int(x.shape[2 + axis])) for axis in range(2))
        else:
            above, left = layer.padding
            extent = [(k - 1) * d for k, d in zip(layer.kernel, layer.dilation, strict=True)]
            below, right = extent[0] - above, extent[1] - left
        assert isinstance(layer.module, nn.Conv2d)
        if layer.module.padding != (0, 0):
            return layer.module(x)
        x = F.pad(x, (left, right, above, below))
        return layer.module(x if layer.before is None else layer.before(x))


class Last(nn.Module):
    """ConvNeXt's: channels last, layer norm, linear layers, a scale for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.gamma = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.permute(0, 2, 3, 1))
        return (self.gamma * self.second(F.gelu(self.first(x)))).permute(0, 3, 1, 2)


class Arithmetic(nn.Module):
    """Values with numbers and with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(8, 1, 1)), nn.Parameter(torch.rand(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = (1 - x * self.scale) / 2 + self.shift
        y = (
            torch.maximum(y, -x)
            + (x.abs() + 1).sqrt()
            - torch.exp(-(x**2))
            + x.clamp(-1, 1) * x.log_softmax(1)
        )
        return self.shift - y


class Radix(nn.Module):
    """Split attention's softmax over two groups, of vectors."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.shape[0], 1, 2, 8).transpose(1, 2)
        return F.softmax(x, 1).reshape(x.shape[0], 16, 1, 1)


def attended(x: Tensor, weights: Tensor) -> Tensor:
    both = x.reshape(x.shape[0], 2, 8, *x.shape[2:]) * weights.reshape(x.shape[0], 2, 8, 1, 1)
    return both.sum(1)


def shuffled(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return (
        x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
    )


def averaged(x: Tensor) -> Tensor:
    return x.view(x.shape[0], 2, 8, *x.shape[2:]).mean(1)


def randomise(network: nn.Module) -> nn.Module:
    """Statistics and weights in which no error hides, at a scale that deep networks keep."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.normal_(module.bias, 0, 0.1)
    return network


def as_layers(network: SelectiveNetwork) -> Drawn:
    """A network of ours as layers, by its graph (dense ones prove that: `tests/run/test_exactness.py`); its
    module's own parts are used."""
    layers, captured = [], network.geometry.captured
    for node in network.graph.nodes:
        stride, options = captured[node.name], node.options
        kind = {"image": "image", "global_mean": "mean"}.get(node.op, "place" if stride else "vector")
        window: dict[str, Any] = {}
        if stride and node.op in ("conv2d", "max_pool2d"):
            kind = "max" if node.op == "max_pool2d" else "conv"
            window = {name: tuple(options[name]) for name in ("kernel", "dilation", "padding")}
            window["step"] = options["stride"][0]
        part = network.module.get_submodule(node.layer) if node.tensors else None
        part = nn.ReLU() if node.op == "relu" else part
        if stride and node.op == "batch_norm":
            kind = "norm"
        calls: dict[str, Any] = {"add": torch.add, "cat": joined, "dropout": nn.Identity()}
        inner = {"natural": options["natural"]} if "natural" in options else {}
        layers.append(
            Layer(
                node.name,
                kind,
                node.inputs,
                node.shape[1],
                stride,
                part,
                calls.get(node.op),
                options=inner,
                **window,
            )
        )
    return Drawn(layers)


def joined(*parts: Tensor) -> Tensor:
    """Along the channels; vectors at every place."""
    return torch.cat([one.expand(-1, -1, *parts[0].shape[2:]) for one in parts], 1)
