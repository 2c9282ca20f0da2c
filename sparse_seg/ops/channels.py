"""What moves channels about: joining, cutting, regrouping; softmax and sums over a group of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.ops.base import (
    OPERATORS,
    Function,
    Operator,
    Tensors,
    UnknownOperator,
    function,
    operator,
    pair,
    reads,
)
from sparse_seg.ops.node import Node


@function("cat")
def cat(*values: Tensor) -> Tensor:
    """Along the channels; vectors are repeated at every place."""
    first = values[0]
    for x in values[1:]:  # torch.compile has no max by a key; there may be no rows beside a vector
        places, most = math.prod(x.shape[2:]), math.prod(first.shape[2:])
        if places > most or (places == most and first.shape[0] == 1):
            first = x
    parts = [
        x if x.shape[0] == first.shape[0] and x.shape[2:] == first.shape[2:]
        else x.expand(first.shape[0], -1, *first.shape[2:])
        for x in values
    ]  # fmt: skip
    return torch.cat(parts, 1)


@reads("cat", "concat")
def read_cat(call: Any) -> Any:
    if call.channel_axis(call.argument("dim"), "tensors") != 1:
        raise UnknownOperator(f"{call.where}: values joined along another axis than the channels")
    return call.make("cat", ["tensors"], {})


@reads("stack")
def read_stack(call: Any) -> Any:
    return call.stacked()


@function("slice")
def slice_channels(x: Tensor, *, start: int, stop: int) -> Tensor:
    return x[:, start:stop]


@reads("slice", "narrow")
def read_slice(call: Any) -> Any:
    axis, length = call.channel_axis(call.argument("dim", 0), call.first), None
    shape = call.value_shape(call.first)
    start = call.argument("start", 0) or 0
    stop = call.argument("end", None)
    if "length" in call.names:
        length = call.argument("length")
        stop = start + length
    stop = shape[axis] if stop is None else min(int(stop), shape[axis])
    start = start + shape[axis] if start < 0 else start
    stop = stop + shape[axis] if stop < 0 else stop
    if call.argument("step", 1) != 1:
        raise UnknownOperator(f"{call.where}: every {call.argument('step')}th of an axis")
    if (start, stop) == (0, shape[axis]):
        return call.same(call.first)
    if axis != 1:
        raise UnknownOperator(f"{call.where}: a part of another axis than the channels")
    return call.make("slice", [call.first], {}, start=start, stop=stop)


@reads("chunk", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk")
def read_split(call: Any) -> Any:
    """One node for each part; what takes a part of the result finds it."""
    if call.channel_axis(call.argument("dim", 0), call.first) != 1:
        raise UnknownOperator(f"{call.where}: a split of another axis than the channels")
    stops, parts = 0, []
    for shape in call.result_shapes():
        start, stops = stops, stops + shape[1]
        parts.append(call.part("slice", [call.first], shape, start=start, stop=stops))
    return parts


@function("view")
def view(x: Tensor, *, axes: Sequence[int], rank: int, order: Sequence[int] | None = None) -> Tensor:
    """The first `rank` channel axes regrouped as `axes`, which then stand in another order."""
    x = x.reshape(x.shape[0], *axes, *x.shape[1 + rank :])
    if order is None:
        return x
    return x.permute(0, *(1 + place for place in order), *range(1 + len(axes), x.ndim))


class OfAxis(Function):
    """Over the channel axis `axis`, counted from 1."""

    def check(self, node: Node, tensors: Tensors) -> None:
        if not 1 <= node.options["axis"] <= len(node.shape) - 2 - node.options.get("keep", True):
            raise ValueError(f"axis {node.options['axis']} is none of the channels'")


def _sum(x: Tensor, axis: int, keep: bool, count: int = 1) -> Tensor:
    """keep: the axis stays, of length 1; count: 1, or its length, for a mean."""
    total = x.sum(axis, keepdim=keep)
    return total if count == 1 else total / count


OPERATORS["softmax"] = OfAxis(lambda x, axis: x.softmax(axis), ["axis"])
OPERATORS["sum"] = OfAxis(_sum, ["axis", "keep", "count"])


@reads("softmax", "_softmax")
def read_softmax(call: Any) -> Any:
    axis = call.channel_axis(call.argument("dim"), call.first)
    return call.make("softmax", [call.first], {}, axis=axis)


@operator("conv1d")
class Conv1d(Operator):
    """Of a vector, along the last of its two channel axes: efficient attention (Wang et al., CVPR 2020).
    Tensors: weight `[O, I, k]`, bias `[O]` or none. Options: padding, dilation, groups."""

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        x, options = inputs[0], node.options
        sides = options["padding"][0], options["dilation"][0], options["groups"]
        out = F.conv1d(x.flatten(2), tensors["weight"], tensors.get("bias"), 1, *sides)
        return out.reshape(*out.shape, *x.shape[3:])

    def macs(self, node: Node, tensors: Tensors) -> int:
        return tensors["weight"].numel() * node.shape[2]


@reads("conv1d")
def read_conv1d(call: Any) -> Any:
    if not call.is_vector("input") or pair(call.argument("stride")) != (1, 1):
        raise UnknownOperator(f"{call.where}: a conv1d over places, or with a stride")
    tensors = {name: call.tensor(name) for name in ("weight", "bias")}
    options = {name: list(pair(call.argument(name), 0)) for name in ("padding", "dilation")}
    return call.make("conv1d", ["input"], tensors, **options, groups=call.argument("groups"))
