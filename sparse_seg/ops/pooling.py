"""Pooling over windows, and over whole images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.ops.base import (
    Operator,
    Pads,
    Pair,
    Reads,
    Spatial,
    Tensors,
    UnknownOperator,
    function,
    operator,
    pair,
    reads,
)
from sparse_seg.ops.node import Node

MOST_PLACES = 64  # along a side, that a pooling gives whatever the image


class Pool(Spatial):
    """A window of one channel. Options: kernel, stride, dilation, padding."""

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        return inputs[0]  # a window of one place


@operator("max_pool2d")
class MaxPool2d(Pool):
    """What lies outside the image does not count."""

    def grid(
        self, node: Node, tensors: Tensors, grid: Tensor, stride: Pair, dilation: Pair, pads: Pads
    ) -> Tensor:
        kernel, (left, right, above, below) = pair(node.options["kernel"]), pads
        fits = 2 * left <= kernel[1] and 2 * above <= kernel[0]  # PyTorch's bound, whatever the dilation
        if left == right and above == below and min(left, above) >= 0 and fits:
            return F.max_pool2d(grid, kernel, stride, (above, left), dilation)
        return F.max_pool2d(F.pad(grid, pads, value=-torch.inf), kernel, stride, 0, dilation)

    def rows(self, node: Node, tensors: Tensors, reads: Reads) -> Tensor:
        values, inside = reads.values(), reads.inside()
        most = values.masked_fill(~inside[:, :, None], -torch.inf).amax(1)
        # a site beyond the border may read nothing: of infinity an activation's gradient is no number
        return most.masked_fill(~inside.any(1, keepdim=True), 0)


@operator("avg_pool2d")
class AvgPool2d(Pool):
    """Option `count_outside`: what lies outside the image counts, as zero."""

    def grid(
        self, node: Node, tensors: Tensors, grid: Tensor, stride: Pair, dilation: Pair, pads: Pads
    ) -> Tensor:
        total, kernel = self._sums(grid, node, stride, dilation, pads), pair(node.options["kernel"])
        if node.options["count_outside"]:
            return total / (kernel[0] * kernel[1])
        ones = torch.ones(1, 1, *map(int, grid.shape[2:]), dtype=grid.dtype, device=grid.device)
        return total / self._sums(ones, node, stride, dilation, pads)

    def rows(self, node: Node, tensors: Tensors, reads: Reads) -> Tensor:
        total = reads.values().sum(1)
        if node.options["count_outside"]:
            return total / reads.count
        return total / reads.inside().to(total.dtype).sum(1, keepdim=True).clamp_min(1)

    def _sums(self, grid: Tensor, node: Node, stride: Pair, dilation: Pair, pads: Pads) -> Tensor:
        channels, kernel = int(grid.shape[1]), pair(node.options["kernel"])
        ones = torch.ones(channels, 1, *kernel, dtype=grid.dtype, device=grid.device)
        return F.conv2d(F.pad(grid, pads), ones, None, stride, 0, dilation, channels)


@reads("max_pool2d")
def read_max_pool(call: Any) -> Any:
    return _read_pool(call, "max_pool2d", call.argument("dilation"))


@reads("avg_pool2d")
def read_avg_pool(call: Any) -> Any:
    if call.argument("divisor_override") is not None:
        raise UnknownOperator(f"{call.where}: an average pooling with divisor_override")
    shape, kernel = call.value_shape("self"), pair(call.argument("kernel_size"))
    if kernel == tuple(shape[-2:]):
        return call.make("global_mean", ["self"], {})
    # beyond the border, ceil_mode's windows are cut off and never counted
    outside = call.argument("count_include_pad") and pair(call.argument("padding"), 0) != (0, 0)
    return _read_pool(call, "avg_pool2d", 1, count_outside=bool(outside))


@torch.library.custom_op("sparse_seg::dilated_mean", mutates_args=())
def dilated_mean(grid: Tensor, stride: int, dilation: int) -> Tensor:
    """Mean of each place and those `dilation` cells right, below, and diagonal, as far as they are inside:
    `nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)`, which PyTorch has not dilated."""
    return _window_mean(grid, stride, dilation)


def _window_mean(grid: Tensor, stride: int, dilation: int) -> Tensor:
    def window_sum(values: Tensor) -> Tensor:
        height, width = values.shape[2:]
        padded, places = F.pad(values, (0, dilation, 0, dilation)), (0, dilation)
        y_x = [(y, x) for y in places for x in places]
        parts = [padded[:, :, y : y + height : stride, x : x + width : stride] for y, x in y_x]
        return parts[0] + parts[1] + parts[2] + parts[3]

    return window_sum(grid) / window_sum(grid.new_ones(1, 1, *grid.shape[2:]))


@dilated_mean.register_fake
def _(grid: Tensor, stride: int, dilation: int) -> Tensor:
    return grid.new_empty(*grid.shape[:2], -(-grid.shape[2] // stride), -(-grid.shape[3] // stride))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape, ctx.sides = inputs[0].shape, inputs[1:]


def _mean_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    with torch.enable_grad():
        grid = grad.new_zeros(ctx.shape, requires_grad=True)
        mean = _window_mean(grid, *ctx.sides)
    return torch.autograd.grad(mean, grid, grad)[0], None, None


dilated_mean.register_autograd(_mean_backward, setup_context=_remember)


@reads("dilated_mean")
def read_dilated_mean(call: Any) -> Any:
    sides = {"stride": [call.argument("stride")] * 2, "dilation": [call.argument("dilation")] * 2}
    return call.make("avg_pool2d", ["grid"], {}, kernel=[2, 2], **sides, padding=[0, 0], count_outside=False)


def _read_pool(call: Any, name: str, dilation: Any, **options: Any) -> Any:
    kernel = pair(call.argument("kernel_size"))
    stride = kernel if not call.argument("stride") else pair(call.argument("stride"))
    sides = {"kernel": kernel, "stride": stride, "dilation": pair(dilation)}
    lists = {key: list(value) for key, value in sides.items()}
    padding = list(pair(call.argument("padding"), 0))
    return call.make(name, ["self"], {}, **lists, padding=padding, **options)


# -- whole images ------------------------------------------------------------------------------------------


@function("global_mean", is_pool=True)
def global_mean(x: Tensor) -> Tensor:
    """`[B, C, h, w]` to a vector `[B, C, 1, 1]`."""
    return x.mean((-2, -1), keepdim=True)


@function("global_max", is_pool=True)
def global_max(x: Tensor) -> Tensor:
    return x.amax((-2, -1), keepdim=True)


@operator("adaptive_avg_pool2d")
class AdaptiveAvgPool2d(Operator):
    """To `size` places, whatever the image, on complete grids alone: a vector of so many places."""

    is_pool = needs_grid = True

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        (x,), size = inputs, pair(node.options["size"])
        if not torch.onnx.is_in_onnx_export():
            return F.adaptive_avg_pool2d(x, size)
        # ONNX has it for sizes alone that divide the grid's
        down, across = (_bins(int(n), count).to(x) for n, count in zip(x.shape[2:], size, strict=True))
        return torch.matmul(torch.matmul(down, x), across.t())

    def check(self, node: Node, tensors: Tensors) -> None:
        if node.size != pair(node.options["size"]) or max(node.size) > MOST_PLACES:
            raise ValueError(f"{node.options['size']} places are not {list(node.size)}, or too many")


def _bins(length: int, count: int) -> Tensor:
    """`[count, length]`: the share of each place in each of adaptive pooling's windows along an axis."""
    number, place = torch.arange(count)[:, None], torch.arange(length)
    inside = (place >= number * length // count) & (place < -(-(number + 1) * length // count))
    return inside / inside.sum(1, keepdim=True)


@reads("adaptive_avg_pool2d")
def read_adaptive(call: Any) -> Any:
    size = pair(call.argument("output_size"))
    if size == (1, 1):
        return call.make("global_mean", ["self"], {})
    return call.make("adaptive_avg_pool2d", ["self"], {}, size=list(size))


@reads("adaptive_max_pool2d")
def read_adaptive_max(call: Any) -> Any:
    if pair(call.argument("output_size")) != (1, 1):
        raise UnknownOperator(f"{call.where}: adaptive max pooling to more than one place")
    return [call.make("global_max", ["self"], {})] * len(call.shapes)


@reads("mean", "amax", "sum")
def read_mean(call: Any) -> Any:
    """Over height and width, or over a channel axis."""
    name, key = call.operator, call.first
    shape, axes = call.value_shape(key), call.argument("dim")
    axes = [axes] if isinstance(axes, int) else list(axes or range(len(shape)))
    axes = sorted(call.channel_axis(axis, key) for axis in axes)
    if axes == [len(shape) - 2, len(shape) - 1]:
        if name == "sum":
            raise UnknownOperator(f"{call.where}: a sum over an image, which grows with its size")
        return call.make("global_mean" if name == "mean" else "global_max", [key], {})
    if len(axes) == 1 and 1 <= axes[0] <= len(shape) - 3 and name in ("sum", "mean"):
        count = {"count": shape[axes[0]]} if name == "mean" else {}
        keep = bool(call.argument("keepdim"))
        if not keep and len(shape) == 4:
            raise UnknownOperator(f"{call.where}: a {name} over all channels that drops their axis")
        return call.make("sum", [key], {}, axis=axes[0], keep=keep, **count)
    raise UnknownOperator(f"{call.where}: a {name} over axes {axes}")
