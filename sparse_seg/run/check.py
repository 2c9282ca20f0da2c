"""Whether a network's graph gives what the module gives that it was captured from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.errors import SparseSegError, first_line
from sparse_seg.graph import logits_of
from sparse_seg.ops import OPERATORS, Graph, Node, Spatial
from sparse_seg.ops.upsample import upsample_logits
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.report import uneven
from sparse_seg.run.values import Interpreter

TOLERANCE = 1e-4  # relative; float32 in another order gives 1e-6, and
ROUNDINGS = 8  # of float16 and bfloat16: up to 4 seen
CHECK_SIZE = 256  # px; module and graph are compared on an image of at most that many along a side


class GraphDiffers(SparseSegError):
    """A graph does not give what its module gives; the message names the first layer that differs."""


@torch.no_grad()
def check_graph(network: SelectiveNetwork, module: nn.Module, size: Sequence[int]) -> None:
    """Compare a network at its own stride with the module that it was captured from, on random images.

    Where they agree at some sizes alone, as of a module that pads to multiples of 32 px and crops, its report
    and a warning say at which.

    Raises:
        GraphDiffers: names the first layer that differs.
    """
    small = [min(length, CHECK_SIZE) for length in size]
    found: str | None = _difference(network, module, small)
    if found:
        raise GraphDiffers(f"the captured graph differs from the module by {found}{_cause(network.graph)}")
    sizes = {step: [step * (length // step | 1) for length in (128, 64)] for step in (1, 2, 4, 8, 16, 32)}
    others = ([128, 64], [192, 128], [64, 192])
    sizes[64] = next(one for one in others if one[0] != small[0] and one[1] != small[1])
    _, least = uneven(network.geometry) or ("", 1)
    differs = False
    for step in (one for one in sizes if one >= min(least, 64)):
        other = sizes[step]
        found = _difference_at(network, module, other)
        if found and step == 64:
            raise GraphDiffers(
                f"what the module computes depends on the images' size: captured at {size[0]}x{size[1]}, its "
                f"graph differs at {other[0]}x{other[1]} by {found}"
            )
        if found == "":
            break
        differs |= found is not None
    if differs:
        network.graph.nodes[0].options["multiple"] = step
        warnings.warn(f"{type(module).__name__}: {network.report().inexact}", stacklevel=5)


def _difference_at(network: SelectiveNetwork, module: nn.Module, size: Sequence[int]) -> str | None:
    """See `_difference`; None where the module takes no images of this size."""
    try:
        module(_image(module, size))
    except Exception:  # whatever its own code raises
        return None
    try:
        return _difference(network, module, size)
    except RuntimeError as error:
        return f"an error ({first_line(error)})"


def _difference(network: SelectiveNetwork, module: nn.Module, size: Sequence[int]) -> str:
    """By how much the logits of an image differ, and in which layer first; nothing if they do not."""
    images = _image(module, size)
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:  # what it returns would replace the output
            if isinstance(out, Tensor):
                seen[name] = out.clone()  # a later activation may change it in place

        return hook

    layers = [pair for pair in module.named_modules() if not isinstance(pair[1], torch.jit.ScriptModule)]
    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers]
    try:
        expected = logits_of(module(images))
    finally:
        for hook in hooks:
            hook.remove()
    theirs, geometry = expected, network.geometry
    run = Interpreter(geometry, network.tensors, images)
    values = run.dense(geometry.own, geometry.nodes)
    grid = run.output(values)
    if expected.shape[1] == 1:
        expected = torch.cat([torch.zeros_like(expected), expected], 1)
    found = grid.tensor
    if found.shape[2:] != expected.shape[2:]:
        full = (int(expected.shape[2]), int(expected.shape[3]))
        trained = geometry.trained(network.graph.output)  # in the module's dtype, as it does it itself
        found = upsample_logits(found, full, grid.stride, trained, network.graph.align_corners)
    if not expected.isfinite().all():
        wide = "; capture it in float32, and call .half() then" if expected.dtype == torch.float16 else ""
        raise GraphDiffers(f"the module's output is not finite in {expected.dtype} on a random image{wide}")
    error = _relative(found, expected)
    if error <= _tolerance(expected):
        return ""
    if _relative(logits_of(module(images)), theirs) > _tolerance(theirs):
        raise GraphDiffers(
            "the module gives another result each time: it is random, or keeps what it has seen"
        )
    return f"{error:.1g} of the logits{_first_difference(network, values, seen)}"


def _image(module: nn.Module, size: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    reference = next((one for one in module.parameters() if one.is_floating_point()), torch.zeros(1))
    return torch.randn(1, 3, *size, generator=generator).to(reference)


def _cause(graph: Graph) -> str:
    """What may make a graph differ from its module."""
    for node in graph.nodes:
        operator = OPERATORS[node.op]
        if isinstance(operator, Spatial) and node.size != (1, 1):
            read = graph.node(node.inputs[0]).size
            pairs = zip(node.size, read, operator.window(node).stride, strict=True)
            if any(made != -(-length // stride) for made, length, stride in pairs):
                return f": {node.where} gives {node.size} of {read} places; pad it to keep them"
    return "; please report it"


def _first_difference(network: SelectiveNetwork, values: dict[str, Any], seen: dict[str, Any]) -> str:
    last: dict[str, Node] = {}  # of a layer and all that it holds, in the order in which layers end
    for node in network.graph.nodes:
        parts = node.layer.split(".")
        for layer in (".".join(parts[:count]) for count in range(len(parts), 0, -1)):
            last.pop(layer, None)
            last[layer] = node
    for layer, node in last.items():
        value, theirs = values.get(node.name), seen.get(layer)
        tensor = getattr(value, "tensor", value)
        if not isinstance(tensor, Tensor) or not isinstance(theirs, Tensor) or tensor.shape != theirs.shape:
            continue
        if _relative(tensor, theirs) > _tolerance(theirs):
            return f", first in {layer or 'the network itself'}"
    return ""


def _tolerance(expected: Tensor) -> float:
    return max(TOLERANCE, ROUNDINGS * torch.finfo(expected.dtype).eps)


def _relative(found: Tensor, expected: Tensor) -> float:
    scale = expected.double().norm().clamp_min(1e-30)
    return ((found.double() - expected.double()).norm() / scale).item()
