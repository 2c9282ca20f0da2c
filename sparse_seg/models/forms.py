"""The forms of a network's parts: norms folded in, plain and dense, and their multiply-adds.

A part that knows a form has a method for it; what is made of parts asks its children. Here stands what
PyTorch's own modules, which have no such methods, become.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from sparse_seg.sparse import SelectiveConv2d, SelectiveDepthwiseConv2d, Step
from sparse_seg.sparse.conv import plain_norm

Module = TypeVar("Module", bound=nn.Module)
FOLDABLE = (nn.Conv2d, nn.Linear, SelectiveConv2d, SelectiveDepthwiseConv2d)  # outputs first in their weights
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def channels_last(module: Module) -> Module:
    """The module with its convolutions' weights in channels_last memory."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def rebuilt(module: Module, children: Mapping[str, nn.Module | None]) -> Module:
    """A module of the same class and settings with other children; it shares nothing that either changes."""
    twin = copy.copy(module)
    vars(twin)["_modules"] = dict(children)
    return twin


def fold_norms(module: nn.Module) -> None:
    """Fold each batch norm, in eval mode, into the layer before it.

    In an `nn.Sequential` a norm follows its layer; any other part names both by its method `norm_pairs`.
    """
    for part in list(module.modules()):
        for before, name in _norm_pairs(part):
            _fold(part.get_submodule(before), part.get_submodule(name))
            parent, _, own = name.rpartition(".")
            setattr(part.get_submodule(parent), own, nn.Identity())
        if isinstance(part, nn.Conv2d):
            channels_last(part)


def _norm_pairs(part: Any) -> list[tuple[str, str]]:
    if hasattr(part, "norm_pairs"):
        return part.norm_pairs()
    if not isinstance(part, nn.Sequential):
        return []
    pairs = itertools.pairwise(part.named_children())
    return [
        (a, b) for (a, layer), (b, norm) in pairs if isinstance(layer, FOLDABLE) and isinstance(norm, NORMS)
    ]


def _fold(layer: Any, norm: Any) -> None:
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    bias = shift if layer.bias is None else layer.bias * scale + shift
    weight = layer.weight * scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight, layer.bias = (nn.Parameter(value.detach()) for value in (weight, bias))


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
