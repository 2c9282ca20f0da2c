"""The forms of a network's parts: fused for prediction, plain and dense, and their multiply-adds.

A part that knows a form has a method for it; what is made of parts asks its children. Here stands what
PyTorch's own modules, which have no such methods, become.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sparse_seg.sparse import SelectiveLinear, Step
from sparse_seg.sparse.conv import plain_norm
from sparse_seg.sparse.tuning import Tuner

Module = TypeVar("Module", bound=nn.Module)


def channels_last(module: Module) -> Module:
    """The module with its convolutions' weights in channels_last memory."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def rebuilt(module: Module, children: Mapping[str, nn.Module | None]) -> Module:
    """A module of the same class and settings with other children; it shares nothing that either changes."""
    twin = copy.copy(module)
    vars(twin)["_modules"] = dict(children)
    return twin


def fused(module: Any, tuner: Tuner) -> Any:
    """A copy for prediction, each batch norm folded into the layer before it, without dropout.

    On rows `Linear, BatchNorm1d[, ReLU]` becomes one `FusedLinear`.
    """
    if hasattr(module, "fused"):
        return module.fused(tuner)
    if not isinstance(module, nn.Sequential):
        return copy.deepcopy(module)
    children: list[nn.Module] = []
    waiting = list(module)
    while waiting:
        child = waiting.pop(0)
        if isinstance(child, SelectiveLinear) and waiting and isinstance(waiting[0], nn.BatchNorm1d):
            norm, relu = waiting.pop(0), bool(waiting) and isinstance(waiting[0], nn.ReLU)
            children.append(child.fused(tuner, norm, relu))
            del waiting[: int(relu)]
        elif isinstance(child, nn.BatchNorm2d):
            conv = children.pop()
            assert isinstance(conv, nn.Conv2d)
            children.append(fuse_conv_bn_eval(conv, child))
        elif not isinstance(child, (nn.Dropout, nn.Dropout2d)):
            children.append(fused(child, tuner))
    return children[0] if len(children) == 1 else channels_last(nn.Sequential(*children))


def plain(module: Any, stride: int) -> nn.Module:
    """A copy that runs dense on grids `[B, C, H, W]` at `stride` px, of PyTorch's own modules."""
    if hasattr(module, "plain"):
        return module.plain(stride, stride)
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*(plain(child, stride) for child in module))
    return plain_norm(module) if isinstance(module, nn.BatchNorm1d) else copy.deepcopy(module)


def row_macs(module: Any, step: Step) -> int:
    """Multiply-adds of what runs on the rows of a step."""
    if hasattr(module, "macs"):
        return module.macs(step, step)
    return sum(row_macs(child, step) for child in module.children())


def grid_macs(module: nn.Module, cells: int) -> int:
    """Multiply-adds of the convolutions of `module`, all with outputs on `cells` places, padding included."""
    convs = (child for child in module.modules() if isinstance(child, nn.Conv2d))
    return cells * sum(conv.weight.numel() for conv in convs)
