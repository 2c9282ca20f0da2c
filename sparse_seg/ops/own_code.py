"""Parts of a network that run by their own code, where no operator here does: attention over all places."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.ops.base import Operator, Tensors, operator
from sparse_seg.ops.call import Call, Ref, reads
from sparse_seg.ops.node import Node


@operator("module")
class Module(Operator):
    """A module from complete grids to one of the same height and width.

    Options: `module`, on the meta device, for the node has its tensors; `macs`, multiply-adds at each place,
    as captured. A graph with such a node is no plain data: no file of ours takes it, an ONNX file does.
    """

    needs_grid = True

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        module = node.options["module"].train(training)
        places = [_place(module, name) for name in tensors]  # torch.jit cannot trace functional_call
        empty = [table[name] for table, name in places]
        try:
            for (table, name), tensor in zip(places, tensors.values(), strict=True):
                table[name] = tensor
            return module(*inputs)
        finally:
            for (table, name), tensor in zip(places, empty, strict=True):
                table[name] = tensor

    def macs(self, node: Node, tensors: Tensors) -> int:
        return node.options["macs"]


def _place(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where a module keeps a parameter or buffer."""
    path, _, own = name.rpartition(".")
    owner = module.get_submodule(path)
    return (owner._parameters if own in owner._parameters else owner._buffers), own


@reads("own_code")
def read_own_code(call: Call) -> Ref:
    if any(ref.form != "first" or ref.is_vector for ref in call.values("inputs")):
        raise call.error("reads more than grids of the image")
    part: Part = call.argument("part")
    tensors = {name: f"{part.name}.{name}" for name in part.tensors}
    return call.make("module", tensors=tensors, module=part.skeleton, macs=part.macs)


class Part:
    """A module of a network, and how it was called: once, by grids of one size, of which it makes another."""

    def __init__(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], channels: int) -> None:
        self.name, self.module, self.inputs, self.channels = name, module, inputs, channels

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        return found | dict(self.module.named_buffers(remove_duplicate=False))

    @cached_property
    def skeleton(self) -> nn.Module:
        """The module without its tensors."""
        return copy.deepcopy(self.module).to("meta")

    @cached_property
    def macs(self) -> int:
        """Multiply-adds at each place, at the size that it was called with."""
        from torch.utils.flop_counter import FlopCounterMode  # it takes a quarter of a second to import

        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.module(*self.inputs)
        height, width = self.inputs[0].shape[2:]
        return round(counter.get_total_flops() / 2 / (height * width))


@torch.no_grad()
def able_parts(module: nn.Module, images: Tensor) -> dict[str, Part]:
    """The parts of a network that can run by their own code, by name, as images `[B, 3, H, W]` show."""
    calls: dict[str, list[Part | None]] = {}

    def note(name: str) -> Any:
        def hook(part: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], out: Any) -> None:
            grids = [*inputs, out]
            fits = inputs and not options and all(isinstance(one, Tensor) and one.ndim == 4 for one in grids)
            fits = fits and len({one.shape[2:] for one in grids}) == 1
            calls.setdefault(name, []).append(Part(name, part, inputs, out.shape[1]) if fits else None)

        return hook

    named = [(name, part) for name, part in module.named_modules() if name]
    hooks = [part.register_forward_hook(note(name), with_kwargs=True) for name, part in named]
    try:
        module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: found[0] for name, found in calls.items() if len(found) == 1 and found[0] is not None}


@contextmanager
def standing_in(parts: Iterable[Part], stand_in: Callable[..., Tensor]) -> Iterator[None]:
    """Call `stand_in(part, *inputs)` in place of each part."""
    changed = list(parts)
    for part in changed:
        _ = part.skeleton, part.macs  # of the module as it is
    for part in changed:
        part.module.forward = partial(stand_in, part)
    try:
        yield
    finally:
        for part in changed:
            del part.module.forward
