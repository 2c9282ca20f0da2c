"""What moves channels about: joining, cutting, regrouping; softmax and sums over a group of them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.ops.base import Operator, Tensors, UnknownOperator, operator, pair, reads
from sparse_seg.ops.node import Node


@operator("cat")
class Cat(Operator):
    """Of values along the channels; vectors are repeated at every place."""

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        first = inputs[0]
        for x in inputs[1:]:  # torch.compile has no max by a key; there may be no rows beside a vector
            places, most = math.prod(x.shape[2:]), math.prod(first.shape[2:])
            if places > most or (places == most and first.shape[0] == 1):
                first = x
        parts = [
            x if x.shape[0] == first.shape[0] and x.shape[2:] == first.shape[2:]
            else x.expand(first.shape[0], -1, *first.shape[2:])
            for x in inputs
        ]  # fmt: skip
        return torch.cat(parts, 1)

    def check(self, node: Node, tensors: Tensors) -> None:
        if not node.inputs:
            raise ValueError("there is nothing to join")


@reads("cat", "concat")
def read_cat(call: Any) -> Any:
    if call.channel_axis(call.argument("dim"), "tensors") != 1:
        raise UnknownOperator(f"{call.where}: values joined along another axis than the channels")
    return call.make("cat", ["tensors"], {})


@reads("stack")
def read_stack(call: Any) -> Any:
    return call.stacked()


@operator("slice")
class Slice(Operator):
    """Channels from `start` to `stop`."""

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        return inputs[0][:, node.options["start"] : node.options["stop"]]

    def check(self, node: Node, tensors: Tensors) -> None:
        start, stop = node.options["start"], node.options["stop"]
        if not 0 <= start < stop or stop - start != node.shape[1]:
            raise ValueError(f"channels {start} to {stop} are not {node.shape[1]}")


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
    if (start, stop) == (0, shape[axis]):
        return call.same(call.first)
    if axis != 1 or call.argument("step", 1) != 1:
        raise UnknownOperator(f"{call.where}: a part of another axis than the channels")
    return call.make("slice", [call.first], {}, start=start, stop=stop)


@reads("chunk", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk")
def read_split(call: Any) -> Any:
    """One node for each part; what takes a part of the result finds it."""
    if call.channel_axis(call.argument("dim", 0), call.first) != 1:
        raise UnknownOperator(f"{call.where}: a split of another axis than the channels")
    stops, parts = 0, []
    for number, shape in enumerate(call.result_shapes()):
        start, stops = stops, stops + shape[1]
        parts.append(call.part(number, "slice", [call.first], shape, start=start, stop=stops))
    return parts


@operator("view")
class View(Operator):
    """Channel axes regrouped: options `axes` and, after that, the `order` in which they stand."""

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        (x,), axes, order = inputs, node.options["axes"], node.options.get("order")
        rank = node.options["rank"]  # of the input's channel axes
        tail = list(x.shape[1 + rank :])
        x = x.reshape(x.shape[0], *axes, *tail)
        if order is not None:
            places = [1 + place for place in order]
            x = x.permute(0, *places, *range(1 + len(axes), x.ndim))
        return x

    def check(self, node: Node, tensors: Tensors) -> None:
        axes, order = node.options["axes"], node.options.get("order")
        if math.prod(axes) != math.prod(node.shape[1:-2]) or min(axes) < 1:
            raise ValueError(f"axes {axes} have not the channels of {list(node.shape)}")
        if order is not None and sorted(order) != list(range(len(axes))):
            raise ValueError(f"order {order} is none of {len(axes)} axes")


@operator("softmax")
class Softmax(Operator):
    """Over the channel axis `axis`, counted from 1."""

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        return inputs[0].softmax(node.options["axis"])

    def check(self, node: Node, tensors: Tensors) -> None:
        if not 1 <= node.options["axis"] <= len(node.shape) - 3:
            raise ValueError(f"axis {node.options['axis']} is none of the channels'")


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
        sides = options["padding"], options["dilation"], options["groups"]
        out = F.conv1d(x.flatten(2), tensors["weight"], tensors.get("bias"), 1, *sides)
        return out.reshape(*out.shape, *x.shape[3:])

    def macs(self, node: Node, tensors: Tensors) -> int:
        return tensors["weight"].numel() * node.shape[2]

    def check(self, node: Node, tensors: Tensors) -> None:
        weight = tensors["weight"].shape
        if len(weight) != 3 or len(node.shape) != 5 or weight[0] != node.shape[1]:
            raise ValueError(f"weight {list(weight)} does not give {list(node.shape)}")


@reads("conv1d")
def read_conv1d(call: Any) -> Any:
    if not call.is_vector("input") or pair(call.argument("stride")) != (1, 1):
        raise UnknownOperator(f"{call.where}: a conv1d over places, or with a stride")
    tensors = {name: call.tensor(name) for name in ("weight", "bias")}
    options = {name: pair(call.argument(name), 0)[0] for name in ("padding", "dilation")}
    return call.make("conv1d", ["input"], tensors, **options, groups=call.argument("groups"))


@operator("sum")
class Sum(Operator):
    """Over the channel axis `axis`, counted from 1; option `keep`: it stays, of length 1."""

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        total = inputs[0].sum(node.options["axis"], keepdim=node.options["keep"])
        return total / node.options["count"] if "count" in node.options else total

    def check(self, node: Node, tensors: Tensors) -> None:
        if node.options["axis"] < 1:
            raise ValueError(f"axis {node.options['axis']} is none of the channels'")
