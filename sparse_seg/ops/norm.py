"""Normalisation: of a channel by its statistics (batch norm), of a place over its channels (layer norm)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules._functions import SyncBatchNorm as synchronised

from sparse_seg.ops.base import Tensors, function
from sparse_seg.ops.call import Call, Ref, reads
from sparse_seg.ops.node import Node

AFFINE = ("weight", "bias")
COUNT = "num_batches_tracked"


@reads("batch_norm")
def read_batch_norm(call: Call) -> Ref:
    if call.argument("training"):
        raise call.error("a batch norm without running statistics")
    tensors = call.named(*AFFINE, "running_mean", "running_var")
    count = "".join(tensors["running_mean"].rpartition(".")[:2]) + COUNT  # of the same module
    tensors |= {COUNT: count} if count in call.record.tensors else {}
    options = {name: call.argument(name) for name in ("eps", "momentum")}
    return call.make("batch_norm", tensors=tensors, **options)


def _check_batch_norm(node: Node, tensors: Tensors) -> None:
    for name, tensor in tensors.items():  # PyTorch compares none of no images
        if name != COUNT and tuple(tensor.shape) != (node.shape[1],):
            raise ValueError(f"{name} is {list(tensor.shape)}, not [{node.shape[1]}]")
    if not 0 < node.options["eps"] <= 1:
        raise ValueError(f"eps is {node.options['eps']}")
    if COUNT in tensors and tensors[COUNT].shape != ():
        raise ValueError(f"{COUNT} is {list(tensors[COUNT].shape)}, not one number")


@function("batch_norm", joins=True, check=_check_batch_norm)
def batch_norm(
    x: Tensor, *, running_mean: Tensor, running_var: Tensor, weight: Tensor | None = None,
    bias: Tensor | None = None, num_batches_tracked: Tensor | None = None, eps: float, momentum: float,
    frozen: bool = False, training: bool,
) -> Tensor:  # fmt: skip
    """Tensors `[C]`, but for num_batches_tracked, one number.

    In training its statistics are those of all sites, and on GPUs of all processes where several are joined,
    as `nn.SyncBatchNorm` has them; with momentum 0 (PyTorch's None, as captured) the running ones are the
    mean of all batches. frozen: always by running statistics.
    """
    training = training and not frozen
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        momentum = momentum or 1 / num_batches_tracked.item()
    count = _processes(x) if training else 1
    if count > 1:
        group = torch.distributed.group.WORLD
        return synchronised.apply(x, weight, bias, running_mean, running_var, eps, momentum, group, count)
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


def _processes(x: Tensor) -> int:
    """How many processes each have a share of a value."""
    joined = x.is_cuda and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if joined else 1


@reads("group_norm", "instance_norm")
def read_group_norm(call: Call) -> Ref:
    if call.operator == "instance_norm" and not call.argument("use_input_stats"):
        raise call.error("an instance norm by running statistics")
    groups = call.argument("num_groups", call.value().shape[1])
    return call.make("group_norm", tensors=call.named(*AFFINE), groups=groups, eps=call.argument("eps"))


@function("group_norm", needs_grid=True)
def group_norm(
    x: Tensor, *, groups: int, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Of groups of channels by their statistics over an image, so on complete grids alone."""
    return F.group_norm(x, groups, weight, bias, eps)


@reads("layer_norm")
def read_layer_norm(call: Call) -> Ref:
    if len(call.argument("normalized_shape")) != 1 or not call.value().is_last:
        raise call.error("a layer norm over more than the channels of a place")
    return call.make("layer_norm", tensors=call.named(*AFFINE), eps=call.argument("eps"))


@function("layer_norm")
def layer_norm(x: Tensor, *, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Over the channels of each place; weight and bias: `[C]`."""
    last = x.ndim - 1  # not -1, which the ONNX exporter would write as it is
    return F.layer_norm(x.movedim(1, last), (int(x.shape[1]),), weight, bias, eps).movedim(last, 1)
