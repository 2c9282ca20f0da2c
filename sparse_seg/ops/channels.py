"""What moves channels about: joining, cutting, regrouping; softmax and sums over a group of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.ops.base import Pair, Tensors, function, pair
from sparse_seg.ops.call import Call, Ref, reads
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
def read_cat(call: Call) -> Ref:
    if call.value().channel_axis(call.argument("dim")) != 1:
        raise call.error("values joined along another axis than the channels")
    return call.make("cat")


@function("slice")
def slice_channels(x: Tensor, *, start: int, stop: int) -> Tensor:
    return x[:, start:stop]


@reads("slice", "narrow")
def read_slice(call: Call) -> Ref:
    value = call.value()
    axis = value.channel_axis(call.argument("dim", 0))
    length, first = value.shape[axis], call.argument("start", 0) or 0
    end = (first + call.argument("length") or None) if call.operator == "narrow" else call.argument("end")
    start, stop, step = slice(first, end, call.argument("step")).indices(length)
    if step != 1:
        raise call.error(f"every {step}th of an axis")
    if (start, stop) == (0, length):
        return value
    if axis != 1:
        raise call.error("a part of another axis than the channels")
    return call.make("slice", start=start, stop=stop)


@reads("chunk", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk")
def read_split(call: Call) -> list[Ref]:
    """One node for each part; what takes a part of the result finds it."""
    value, start, parts = call.value(), 0, list[Ref]()
    if value.channel_axis(call.argument("dim", 0)) != 1:
        raise call.error("a split of another axis than the channels")
    for number, shape in enumerate(call.shapes):
        stop = start + value.canonical(shape)[1]
        parts.append(call.make("slice", result=number, start=start, stop=stop))
        start = stop
    return parts


@function("view")
def view(x: Tensor, *, axes: Sequence[int], rank: int, order: Sequence[int] | None = None) -> Tensor:
    """The first `rank` channel axes regrouped as `axes`, which then stand in another order."""
    x = x.reshape(x.shape[0], *axes, *x.shape[1 + rank :])
    if order is None:
        return x
    return x.permute(0, *(1 + place for place in order), *range(1 + len(axes), x.ndim))


def _check_axis(node: Node, tensors: Tensors) -> None:
    """Of what works over the channel axis `axis`, counted from 1."""
    if not 1 <= node.options["axis"] <= len(node.shape) - 2 - node.options.get("keep", True):
        raise ValueError(f"axis {node.options['axis']} is none of the channels'")


@function("softmax", check=_check_axis)
def softmax(x: Tensor, *, axis: int) -> Tensor:
    return x.softmax(axis)


@function("log_softmax", check=_check_axis)
def log_softmax(x: Tensor, *, axis: int) -> Tensor:
    return x.log_softmax(axis)


@function("sum", check=_check_axis)
def sum_channels(x: Tensor, *, axis: int, keep: bool, count: int = 1) -> Tensor:
    """keep: the axis stays, of length 1; count: 1, or its length, for a mean."""
    total = x.sum(axis, keepdim=keep)
    return total if count == 1 else total / count


@reads("softmax", "_softmax", "log_softmax", "_log_softmax")
def read_softmax(call: Call) -> Ref:
    return call.make(call.operator.removeprefix("_"), axis=call.value().channel_axis(call.argument("dim")))


@function("conv1d", macs=lambda node, tensors: tensors["weight"].numel() * node.shape[2])
def conv1d(
    x: Tensor, *, weight: Tensor, bias: Tensor | None = None, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """Of a vector, along the last of its two channel axes: efficient attention (Wang et al., CVPR 2020).

    weight: `[O, I, k]`; bias: `[O]`.
    """
    out = F.conv1d(x.flatten(2), weight, bias, 1, padding[0], dilation[0], groups)
    return out.reshape(*out.shape, *x.shape[3:])


@reads("conv1d")
def read_conv1d(call: Call) -> Ref:
    if not call.value().is_vector or pair(call.argument("stride")) != (1, 1):
        raise call.error("a conv1d over places, or with a stride")
    padding, dilation = (list(pair(call.argument(name), 0)) for name in ("padding", "dilation"))
    options = {"padding": padding, "dilation": dilation, "groups": call.argument("groups")}
    return call.make("conv1d", tensors=call.named("weight", "bias"), **options)
