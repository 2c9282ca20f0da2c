"""Convolutions of any kernel, stride, dilation and number of groups; linear layers are 1x1 ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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
from sparse_seg.ops.call import Call, Ref, reads
from sparse_seg.ops.node import Node

# of gathered taps. Depthwise, 1 to 4 MiB took 0.7 of the time of all at once in onnxruntime on an AMD EPYC
# (462 sites, 576 and 960 channels); products take the same time with 2 to 32 MiB if tiles are of taps
TILE_BYTES = 4 << 20


@reads("conv2d")
def read_conv2d(call: Call) -> Ref:
    weight, padding = call.tensor("weight"), call.argument("padding")
    assert weight is not None
    window = window_options(weight.shape[2:], call.argument("stride"), call.argument("dilation"))
    if padding == "same":
        both = zip(window["kernel"], window["dilation"], strict=True)
        window["padding"] = [(kernel - 1) * dilation // 2 for kernel, dilation in both]
    elif padding != "valid":
        window["padding"] = list(pair(padding, 0))
    if window["kernel"] == [1, 1] and window["padding"] != [0, 0]:
        raise call.error("a 1x1 convolution with padding has places outside the image")
    tensors, groups = call.named("weight", "bias"), call.argument("groups")
    return call.make("conv2d", tensors=tensors, **window, groups=groups)


@reads("linear")
def read_linear(call: Call) -> Ref:
    return call.make("conv2d", tensors=call.named("weight", "bias"), **window_options(1), groups=1)


@operator("conv2d")
class Conv2d(Spatial):
    """Tensors: weight `[O, I / groups, kh, kw]`, or `[O, I]` of a linear layer; bias `[O]` or none."""

    skips_outside = True

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        """1x1: on grids `[B, I, h, w]`, vectors `[B, I, 1, 1]`, or rows `[N, I]`."""
        (x,), weight = inputs, tensors["weight"]
        if x.ndim == 4:
            return F.conv2d(x, kernel_of(weight), tensors.get("bias"), groups=node.options["groups"])
        if node.options["groups"] == 1:
            return F.linear(x, weight.flatten(1), tensors.get("bias"))
        x, weight, bias = _autocast(x, weight, tensors.get("bias"))
        return _grouped(x[:, None], weight, bias, node.options["groups"])

    def grid(
        self, node: Node, tensors: Tensors, grid: Tensor, stride: Pair, dilation: Pair, pads: Pads
    ) -> Tensor:
        weight, bias, groups = kernel_of(tensors["weight"]), tensors.get("bias"), node.options["groups"]
        left, right, above, below = pads
        learns = torch.is_grad_enabled() and weight.requires_grad
        if learns and weight.shape[2:] == (1, 1) and stride != (1, 1) and not any(pads):
            # oneDNN's gradient of a strided 1x1 weight writes beyond its memory (4 channels, channels_last)
            grid, stride = grid[:, :, :: stride[0], :: stride[1]], (1, 1)
        if learns and grid.is_cpu and stride == (1, 1) != dilation and 1 < groups == grid.shape[1]:
            return _by_phases(F.pad(grid, pads), weight, bias, dilation)
        if left == right and above == below and min(left, above) >= 0:
            return F.conv2d(grid, weight, bias, stride, (above, left), dilation, groups)
        if torch.onnx.is_in_onnx_export() and min(pads) >= 0:
            return _Uneven.apply(grid, weight, bias, stride, dilation, pads, groups)
        return F.conv2d(F.pad(grid, pads), weight, bias, stride, 0, dilation, groups)

    def rows(self, node: Node, tensors: Tensors, reads: Reads) -> Tensor:
        weight, bias, groups = tensors["weight"], tensors.get("bias"), node.options["groups"]
        if groups > 1:
            table, weight, bias = _autocast(reads.table, weight, bias)
            tiles = replace(reads, table=table).tiles(TILE_BYTES)
            parts = [_grouped(part.values(), weight, bias, groups) for _, _, part in tiles]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        matrix = weight.permute(0, 2, 3, 1).flatten(1)  # [O, T * I]
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            taken = reads.table.index_select(0, reads.index).reshape(-1, int(matrix.shape[1]))
            return F.linear(taken, matrix, bias)
        if not torch.is_grad_enabled():
            return _product(reads, matrix, bias)
        return _GatherProduct.apply(reads.table, matrix, bias, reads.index, reads.make, *reads.parts)

    def macs(self, node: Node, tensors: Tensors) -> int:
        return tensors["weight"].numel()

    def check(self, node: Node, tensors: Tensors) -> None:
        weight = tensors["weight"]
        if weight.ndim not in (2, 4) or (tuple(weight.shape[2:]) or (1, 1)) != pair(node.options["kernel"]):
            raise ValueError(f"weight {list(weight.shape)} has another kernel than {node.options['kernel']}")


def _by_phases(grid: Tensor, weight: Tensor, bias: Tensor | None, dilation: Pair) -> Tensor:
    """A dilated depthwise convolution without padding, as one without dilation on the grids that every
    `dilation`-th row and column make: oneDNN has its gradients in a fifth of the time."""
    rows, columns = dilation
    height, width = (
        length - (taps - 1) * step
        for length, taps, step in zip(grid.shape[2:], weight.shape[2:], dilation, strict=True)
    )
    batch, channels = grid.shape[:2]
    grid = F.pad(grid, (0, -grid.shape[3] % columns, 0, -grid.shape[2] % rows)).permute(0, 2, 3, 1)
    grid = grid.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    out = F.conv2d(grid.permute(0, 3, 1, 2), weight, bias, groups=channels).permute(0, 2, 3, 1)
    out = out.unflatten(0, (batch, rows, columns)).permute(0, 3, 1, 4, 2, 5).flatten(3, 4).flatten(1, 2)
    return out[:, :height, :width].permute(0, 3, 1, 2)


@function("conv2d_of_constant")
def conv2d_of_constant(x: Tensor, *, weight: Tensor, groups: int) -> Tensor:
    """What a convolution gives where all its taps read one vector `[B, I, 1, 1]`, without bias."""
    return F.conv2d(x, weight.sum((2, 3), keepdim=True), groups=groups)


def kernel_of(weight: Tensor) -> Tensor:
    """A weight as `[O, I, kh, kw]`."""
    return weight if weight.ndim == 4 else weight[:, :, None, None]


def _grouped(taps: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Taps `[M, T, I]` to `[M, O]`, each group of channels by itself."""
    count, channels, out = int(taps.shape[1]), int(taps.shape[2]), int(weight.shape[0])
    flat = weight.flatten(2)  # [O, I / groups, T]
    if groups == channels:
        each = out // groups
        factors = flat.reshape(groups, each, count).permute(2, 1, 0)  # [T, each, I]
        if each == 1:
            result = (taps * factors[:, 0]).sum(1)
        else:
            result = (taps[:, :, None] * factors).sum(1).permute(0, 2, 1).reshape(-1, out)
    else:
        within = channels // groups
        values = (
            taps.reshape(-1, count, groups, within).permute(2, 0, 1, 3).reshape(groups, -1, count * within)
        )
        matrix = flat.reshape(groups, out // groups, within, count).permute(0, 3, 2, 1)
        matrix = matrix.reshape(groups, count * within, out // groups)
        result = torch.bmm(values, matrix).permute(1, 0, 2).reshape(-1, out)
    return result if bias is None else result + bias


class _Uneven(torch.autograd.Function):
    """A convolution with other padding before than behind, as one operator of ONNX.

    A padding of its own leaves onnxruntime's blocked layout: 14 of 141 ms of a MobileNetV2 with TensorFlow's.
    """

    @staticmethod
    def forward(
        ctx: Any, grid: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, dilation: Pair, pads: Pads,
        groups: int,
    ) -> Tensor:  # fmt: skip
        return F.conv2d(F.pad(grid, pads), weight, bias, stride, 0, dilation, groups)

    @staticmethod
    def symbolic(
        g: Any, grid: Any, weight: Any, bias: Any, stride: Pair, dilation: Pair, pads: Pads, groups: int
    ) -> Any:
        left, right, above, below = pads
        return g.op(
            "Conv",
            grid,
            weight,
            *([] if bias is None else [bias]),
            strides_i=stride,
            dilations_i=dilation,
            pads_i=[above, left, below, right],
            group_i=groups,
        )


def _product(reads: Reads, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """What taps read times a matrix `[O, T * I]`, tile by tile: `[M, O]`."""
    table, matrix, bias = _autocast(reads.table, matrix, bias)
    channels = int(table.shape[1])
    out = table.new_empty(reads.sites, int(matrix.shape[0]))
    by_taps = matrix.element_size() >= 4  # sums of few bits are rounded once
    for sites, taps, part in replace(reads, table=table).tiles(TILE_BYTES, by_taps):
        own, total = matrix[:, taps.start * channels : taps.stop * channels].t(), out[sites]
        start = total if taps.start else bias
        if start is None:
            torch.mm(part.values().flatten(1), own, out=total)  # no name: the next tile takes its memory
        else:
            torch.addmm(start, part.values().flatten(1), own, out=total)
    return out


class _GatherProduct(torch.autograd.Function):
    """`_product`; backward gathers again in place of keeping T copies.

    Of a table with parts it keeps these, see `Reads`.
    """

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, matrix: Tensor, bias: Tensor | None, index: Tensor,
        make: Callable[..., Tensor], *parts: Tensor,
    ) -> Tensor:  # fmt: skip
        table, matrix, bias = _autocast(table, matrix, bias)
        ctx.save_for_backward(matrix, index, *(parts or (table,)))
        ctx.make, ctx.count = make, matrix.shape[1] // table.shape[1]
        return _product(Reads(table, index, ctx.count), matrix, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrix, index, *parts = ctx.saved_tensors
        table = ctx.make(*parts).to(matrix.dtype)
        grad_table = torch.zeros_like(table) if ctx.needs_input_grad[0] else None
        total = torch.zeros_like(matrix, dtype=torch.promote_types(matrix.dtype, torch.float32))
        channels = table.shape[1]
        for sites, taps, part in Reads(table, index, ctx.count).tiles(TILE_BYTES, by_taps=True):
            own = slice(taps.start * channels, taps.stop * channels)
            total[:, own] += grad[sites].t() @ part.values().flatten(1)
            if grad_table is not None:
                grad_table.index_add_(0, part.index, (grad[sites] @ matrix[:, own]).reshape(-1, channels))
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_table, total.to(matrix.dtype), grad_bias, None, None, *(None for _ in parts)


def _autocast(table: Tensor, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does for built-in convolutions; products of rows have to ask for it."""
    if not torch.is_autocast_enabled(table.device.type) or table.dtype == torch.float64:
        return table, matrix, bias
    dtype = torch.get_autocast_dtype(table.device.type)
    return table.to(dtype), matrix.to(dtype), None if bias is None else bias.to(dtype)
