"""Pooling over windows, and over whole images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.ops.base import (
    Pads,
    Pair,
    Reads,
    Spatial,
    Tensors,
    function,
    operator,
    pair,
    window_options,
)
from sparse_seg.ops.call import Call, Ref, Stack, reads
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
def read_max_pool(call: Call) -> Ref:
    return call.make("max_pool2d", **_window_of(call))


@reads("avg_pool2d")
def read_avg_pool(call: Call) -> Ref:
    if call.argument("divisor_override") is not None:
        raise call.error("an average pooling with divisor_override")
    window = _window_of(call)
    if window["kernel"] == list(call.value().node.size):
        return call.make("global_mean")
    # beyond the border, ceil_mode's windows are cut off and never counted
    outside = call.argument("count_include_pad") and window["padding"] != [0, 0]
    return call.make("avg_pool2d", **window, count_outside=bool(outside))


def _window_of(call: Call) -> dict[str, Any]:
    kernel, stride, dilation, padding = map(call.argument, ("kernel_size", "stride", "dilation", "padding"))
    return window_options(kernel, stride or kernel, dilation, padding)


def _window_mean(grid: Tensor, stride: int, dilation: int) -> Tensor:
    def window_sum(values: Tensor) -> Tensor:
        height, width = values.shape[2:]
        padded, places = F.pad(values, (0, dilation, 0, dilation)), (0, dilation)
        y_x = [(y, x) for y in places for x in places]
        parts = [padded[:, :, y : y + height : stride, x : x + width : stride] for y, x in y_x]
        return parts[0] + parts[1] + parts[2] + parts[3]

    return window_sum(grid) / window_sum(grid.new_ones(1, 1, *grid.shape[2:]))


_LIBRARY = torch.library.Library("sparse_seg", "FRAGMENT")
_LIBRARY.define("dilated_mean(Tensor grid, int stride, int dilation) -> Tensor")
_LIBRARY.impl("dilated_mean", _window_mean, "CompositeImplicitAutograd")


def dilated_mean(grid: Tensor, stride: int, dilation: int) -> Tensor:
    """Mean of each place and those `dilation` cells right, below, and diagonal, as far as they are inside:
    `nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)`, which PyTorch has not dilated.

    An operator of its own, so that a graph has it whole.
    """
    return torch.ops.sparse_seg.dilated_mean(grid, stride, dilation)


@reads("dilated_mean")
def read_dilated_mean(call: Call) -> Ref:
    window = window_options(2, call.argument("stride"), call.argument("dilation"))
    return call.make("avg_pool2d", **window, count_outside=False)


# -- whole images ------------------------------------------------------------------------------------------


@function("global_mean", is_pool=True)
def global_mean(x: Tensor) -> Tensor:
    """`[B, C, h, w]` to a vector `[B, C, 1, 1]`."""
    return x.mean((-2, -1), keepdim=True)


@function("global_max", is_pool=True)
def global_max(x: Tensor) -> Tensor:
    return x.amax((-2, -1), keepdim=True)


def _check_places(node: Node, tensors: Tensors) -> None:
    if node.size != pair(node.options["size"]) or max(node.size) > MOST_PLACES:
        raise ValueError(f"{node.options['size']} places are not {list(node.size)}, or too many")


@function("adaptive_avg_pool2d", is_pool=True, needs_grid=True, check=_check_places)
def adaptive_avg_pool2d(x: Tensor, *, size: Pair) -> Tensor:
    """To `size` places, whatever the image, on complete grids alone: a vector of so many places."""
    if not torch.onnx.is_in_onnx_export():
        return F.adaptive_avg_pool2d(x, pair(size))
    # ONNX has it for sizes alone that divide the grid's
    down, across = (_bins(int(n), count).to(x) for n, count in zip(x.shape[2:], pair(size), strict=True))
    return torch.matmul(torch.matmul(down, x), across.t())


def _bins(length: int, count: int) -> Tensor:
    """`[count, length]`: the share of each place in each of adaptive pooling's windows along an axis."""
    number, place = torch.arange(count)[:, None], torch.arange(length)
    inside = (place >= number * length // count) & (place < -(-(number + 1) * length // count))
    return inside / inside.sum(1, keepdim=True)


@reads("adaptive_avg_pool2d")
def read_adaptive(call: Call) -> Ref:
    size = pair(call.argument("output_size"))
    return call.make("global_mean") if size == (1, 1) else call.make("adaptive_avg_pool2d", size=list(size))


@reads("adaptive_max_pool2d")
def read_adaptive_max(call: Call) -> list[Ref]:
    if pair(call.argument("output_size")) != (1, 1):
        raise call.error("adaptive max pooling to more than one place")
    return [call.make("global_max")] * len(call.shapes)


@reads("mean", "amax", "sum")
def read_mean(call: Call) -> Ref:
    """Over height and width, over a channel axis, or over a stack."""
    name, axes, stack = call.operator, call.argument("dim"), call.record.known(call.tensors[0])
    if isinstance(stack, Stack) and name == "sum" and axes == [0] and not call.argument("keepdim"):
        return call.added(stack.refs)
    value = call.value()
    rank = len(value.shape)
    axes = [axes] if isinstance(axes, int) else list(axes or range(rank))
    axes = sorted(value.channel_axis(axis) for axis in axes)
    if axes == [rank - 2, rank - 1]:
        if name == "sum":
            raise call.error("a sum over an image, which grows with its size")
        return call.make("global_mean" if name == "mean" else "global_max")
    if len(axes) == 1 and 1 <= axes[0] <= rank - 3 and name in ("sum", "mean"):
        count = {"count": value.shape[axes[0]]} if name == "mean" else {}
        keep = bool(call.argument("keepdim"))
        if not keep and rank == 4:
            raise call.error(f"a {name} over all channels that drops their axis")
        return call.make("sum", axis=axes[0], keep=keep, **count)
    raise call.error(f"a {name} over axes {axes}")
