"""Normalisation: of a channel by its statistics (batch norm), of a place over its channels (layer norm)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as synchronised

from sparse_seg.ops.base import Operator, Tensors, UnknownOperator, function, operator, reads
from sparse_seg.ops.node import Node

AFFINE = ("weight", "bias")
COUNT = "num_batches_tracked"


@reads("batch_norm")
def read_batch_norm(call: Any) -> Any:
    if call.argument("training"):
        raise UnknownOperator(f"{call.where}: a batch norm without running statistics")
    names = {name: call.tensor(name) for name in (*AFFINE, "running_mean", "running_var")}
    names[COUNT] = call.beside(names["running_mean"], COUNT)
    return call.make(
        "batch_norm", ["input"], names, eps=call.argument("eps"), momentum=call.argument("momentum")
    )


@operator("batch_norm")
class BatchNorm(Operator):
    """Tensors: running_mean, running_var, and, where it has them, weight and bias, `[C]` each, and
    num_batches_tracked.

    In training its statistics are those of all sites, and on GPUs of all processes where several are joined,
    as `nn.SyncBatchNorm` has them; with momentum 0 (PyTorch's None, as captured) the
    running ones are the mean of all batches. Option `frozen`: always by running statistics.
    """

    joins = True

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        weight, bias = (tensors.get(name) for name in AFFINE)
        training = training and not node.options.get("frozen", False)
        statistics = tensors["running_mean"], tensors["running_var"]
        momentum = node.options["momentum"]
        if training and COUNT in tensors:
            tensors[COUNT].add_(1)
            momentum = momentum or 1 / tensors[COUNT].item()
        eps, count = node.options["eps"], _processes(inputs[0]) if training else 1
        if count > 1:
            group = torch.distributed.group.WORLD
            return synchronised.apply(inputs[0], weight, bias, *statistics, eps, momentum, group, count)
        return F.batch_norm(inputs[0], *statistics, weight, bias, training, momentum, eps)

    def check(self, node: Node, tensors: Tensors) -> None:
        for name, tensor in tensors.items():  # PyTorch compares none of no images
            if name != COUNT and tuple(tensor.shape) != (node.shape[1],):
                raise ValueError(f"{name} is {list(tensor.shape)}, not [{node.shape[1]}]")
        if not 0 < node.options["eps"] <= 1:
            raise ValueError(f"eps is {node.options['eps']}")
        if COUNT in tensors and tensors[COUNT].shape != ():
            raise ValueError(f"{COUNT} is {list(tensors[COUNT].shape)}, not one number")


def _processes(x: Tensor) -> int:
    """How many processes each have a share of a value."""
    joined = x.is_cuda and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if joined else 1


@reads("group_norm", "instance_norm")
def read_group_norm(call: Any) -> Any:
    if call.operator == "instance_norm" and not call.argument("use_input_stats"):
        raise UnknownOperator(f"{call.where}: an instance norm by running statistics")
    groups = call.argument("num_groups", call.value_shape("input")[1])
    names = {name: call.tensor(name) for name in AFFINE}
    return call.make("group_norm", ["input"], names, groups=groups, eps=call.argument("eps"))


@function("group_norm", needs_grid=True)
def group_norm(
    x: Tensor, *, groups: int, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Of groups of channels by their statistics over an image, so on complete grids alone."""
    return F.group_norm(x, groups, weight, bias, eps)


@reads("layer_norm")
def read_layer_norm(call: Any) -> Any:
    if len(call.argument("normalized_shape")) != 1 or not call.is_last("input"):
        raise UnknownOperator(f"{call.where}: a layer norm over more than the channels of a place")
    names = {name: call.tensor(name) for name in AFFINE}
    return call.make("layer_norm", ["input"], names, eps=call.argument("eps"))


@function("layer_norm")
def layer_norm(x: Tensor, *, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Over the channels of each place; weight and bias: `[C]`."""
    last = x.ndim - 1  # not -1, which the ONNX exporter would write as it is
    return F.layer_norm(x.movedim(1, last), (int(x.shape[1]),), weight, bias, eps).movedim(last, 1)
