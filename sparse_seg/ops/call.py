"""A call of PyTorch's as a family's reader sees it, and what is known of the network that it stands in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparse_seg.ops.base import OPERATORS, UnknownOperator
from sparse_seg.ops.node import Node

# names of tensors that no state dict has
CONSTANT, COMPUTED = "constant.", "computed."  # the latter are computed of parameters
# operators of PyTorch's that change axes alone
SHAPES = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "_unsafe_view", "unflatten"}
MOVES = {"permute", "transpose", "expand", "expand_as"}


@dataclass(frozen=True)
class Ref:
    """A value as PyTorch's graph has it.

    form: `first`, axes as in `Node.shape`; `last`, channels last; `flat`, a vector without height and width.
    is_vector: whether it is one of each image.
    """

    node: Node
    form: str = "first"
    is_vector: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """As `Node.shape`."""
        return self.node.shape

    @property
    def rank(self) -> int:
        """Of PyTorch's tensor."""
        return len(self.shape) - (2 if self.form == "flat" else 0)

    @property
    def is_last(self) -> bool:
        """Whether the channels are the last axis."""
        return self.form == "last" or (self.form == "flat" and self.rank == 2)

    def channel_axis(self, axis: int) -> int:
        """An axis of PyTorch's tensor as an axis of `Node.shape`."""
        axis = axis + self.rank if axis < 0 else axis
        return {1: 2, 2: 3, 3: 1}.get(axis, axis) if self.form == "last" else axis

    def canonical(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor of this form as `Node.shape`."""
        if self.form == "last":
            return (shape[0], shape[3], shape[1], shape[2])
        return (*shape, 1, 1) if self.form == "flat" else shape


@dataclass(frozen=True)
class Constant:
    """A tensor of the network's, perhaps in another shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stack:
    """Values along a new axis before all others; a sum over it is known, and nothing else."""

    refs: list[Ref]


Known = Ref | Constant | Stack | UnknownOperator  # the latter is raised once the output needs it


class Record:
    """What is known of a network while it is read.

    Attributes:
        nodes: that are read so far.
        parameters, tensors: of the network, by name.
        constants: tensors that the state dict has not.
    """

    def __init__(self, module: nn.Module) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, Tensor] = {}
        self._known: dict[int, Known] = {}  # by the tensor's id
        self._kept: list[Tensor] = []  # all of these, lest another one gets an id of theirs
        self.parameters = dict(module.named_parameters(remove_duplicate=False))
        self.tensors = self.parameters | dict(module.named_buffers(remove_duplicate=False))
        for name, tensor in self.tensors.items():
            if id(tensor) not in self._known:
                self.bind(tensor, Constant(name, tuple(tensor.shape)))

    def known(self, tensor: Any) -> Known | None:
        """What a tensor is; None for what is no tensor."""
        if not isinstance(tensor, Tensor):
            return None
        if id(tensor) not in self._known:  # an attribute of the module's, or made by torch.tensor
            self.bind(tensor, self.constant(tensor, ()))
        return self._known[id(tensor)]

    def constant(self, value: Tensor, made_of: Iterable[Any]) -> Constant:
        """A new constant, computed of those, as a standardised weight is."""
        trains = any(one.name in self.parameters or one.name.startswith(COMPUTED) for one in made_of)
        name = f"{COMPUTED if trains else CONSTANT}{len(self.constants)}"
        own = (one.dtype for one in self.parameters.values() if one.is_floating_point())
        is_real = value.is_floating_point() or value.is_complex()
        dtype = value.dtype if is_real else next(own, torch.get_default_dtype())  # files hold no others
        with torch.inference_mode(False):
            self.constants[name] = value.detach().to(dtype, copy=True)
        return Constant(name, tuple(value.shape))

    def bind(self, tensor: Tensor, known: Known) -> None:
        """Note what a tensor is."""
        self._known[id(tensor)] = known
        self._kept.append(tensor)


class Call:
    """What a family's reader asks of one call of an operator of PyTorch's.

    Args:
        arguments: by name, in the operator's order.
        layer: that calls it.

    Attributes:
        tensors: that it reads; shapes: of what it gives.
    """

    def __init__(self, record: Record, operator: str, arguments: dict[str, Any], layer: str) -> None:
        self.record, self.operator, self.arguments, self.layer = record, operator, arguments, layer
        self.tensors = [one for one in tree_leaves(arguments) if isinstance(one, Tensor)]
        self.shapes: list[tuple[int, ...]] = []

    def error(self, message: str) -> UnknownOperator:
        """To raise where no operator here does what the call does."""
        return UnknownOperator(f"{self.layer or 'the network'}: {message}", filter(None, [self.layer]))

    def argument(self, name: str, default: Any = None) -> Any:
        return self.arguments.get(name, default)

    def is_value(self, name: str) -> bool:
        return isinstance(self.record.known(self.argument(name)), Ref)

    def values(self, name: str) -> list[Ref]:
        """Those of an argument that is a value, or a list of values."""
        argument = self.argument(name)
        refs = []
        for one in argument if isinstance(argument, (list, tuple)) else [argument]:
            found = self.record.known(one)
            if isinstance(found, Stack):
                raise self.error(f"{self.operator} of values stacked along another axis than the channels")
            if not isinstance(found, Ref):
                raise self.error(f"{self.operator} of what is no value of the image")
            refs.append(found)
        return refs

    def value(self, name: str = "") -> Ref:
        """An argument, by default the first, or of a list of values the first one."""
        return self.values(name or next(iter(self.arguments)))[0]

    def tensor(self, name: str) -> Constant | None:
        """A tensor of the network's; None where there is none."""
        argument = self.argument(name)
        found = self.record.known(argument)
        if argument is not None and not isinstance(found, Constant):
            raise self.error(f"the {name} of {self.operator} is computed, not a parameter")
        return found if isinstance(found, Constant) else None

    def named(self, *names: str) -> dict[str, str]:
        """The state dict's names of those of the arguments that are there."""
        found = {name: self.tensor(name) for name in names}
        return {name: one.name for name, one in found.items() if one is not None}

    def channel_axes(self, shape: Sequence[int], ref: Ref) -> list[int]:
        """A tensor's channel axes where it is combined with a value at every place."""
        if math.prod(shape) == 1:
            return [1] * (len(ref.shape) - 3)
        full = [1] * (ref.rank - len(shape)) + list(shape)
        if ref.form == "first" and full[0] == 1 and full[-2:] == [1, 1]:
            return full[1:-2]
        if ref.form != "first" and len(ref.shape) == 4 and math.prod(shape) == shape[-1]:
            return [int(shape[-1])]
        raise self.error(f"a tensor {list(shape)} that differs from place to place")

    def make(
        self, op: str, *inputs: str, tensors: dict[str, str] | None = None, result: int = 0, **options: Any
    ) -> Ref:
        """Enter a node.

        Args:
            inputs: arguments that it reads; none: the first.
            tensors: names in the state dict, by role.
            result: which one of several it makes.
        """
        refs = [ref for name in inputs or list(self.arguments)[:1] for ref in self.values(name)]
        first, found = next((ref for ref in refs if not ref.is_vector), refs[0]), self.shapes[result]
        if OPERATORS[op].is_pool and len(found) != len(refs[0].shape):
            first = replace(first, form="flat")
        return self._enter(op, refs, first.canonical(found), first.form, tensors, **options)

    def reshaped(self) -> Known:
        """The result of an operator that changes axes alone."""
        found, out = self.record.known(self.tensors[0]), self.shapes[0]
        moves = self.operator in ("permute", "transpose")
        if isinstance(found, Constant):
            if moves or math.prod(out) != math.prod(found.shape):
                raise self.error("a parameter that is moved about")
            return replace(found, shape=out)
        found = self.value()
        if moves:
            return self._permuted(found)
        shape, form = found.shape, found.form
        if found.is_vector:
            tail = len(out) >= 4 and (out[-2:] == (1, 1) or self.operator in ("expand", "expand_as"))
            axes, form = (out[1:-2], "first") if tail else (out[1:], "flat")
        elif form == "first" and out[-2:] == shape[-2:]:
            axes = out[1:-2]
        else:
            raise self.error(f"{self.operator} to {list(out)} moves places about")
        if out[0] != 1 or math.prod(axes) != math.prod(shape[1:-2]):
            raise self.error(f"{self.operator} from {list(shape)} to {list(out)}")
        return replace(found, form=form) if axes == shape[1:-2] else self._view(found, axes, form)

    def stacked(self) -> Ref | Stack:
        """Values of one channel axis, joined along a new one before it; or such that a sum may take apart."""
        refs, shape = self.values("tensors"), self.shapes[0]
        if self.argument("dim", 0) == 0 and len({ref.form for ref in refs}) == 1:
            return Stack(refs)
        if self.argument("dim", 0) != 1 or len(shape) != 5 or any(ref.form != "first" for ref in refs):
            raise self.error("values stacked along another axis than the channels")
        joined = self._enter("cat", refs, (1, shape[1] * shape[2], *shape[3:]), "first")
        return self._view(joined, shape[1:3], "first")

    def added(self, refs: Sequence[Ref]) -> Ref:
        """The sum of values of one shape and form."""
        total, *others = refs
        for ref in others:
            total = self._enter("add", [total, ref], ref.shape, ref.form)
        return total

    def _permuted(self, ref: Ref) -> Ref:
        if self.operator == "transpose":
            order = list(range(ref.rank))
            a, b = (self.argument(name) % ref.rank for name in ("dim0", "dim1"))
            order[a], order[b] = order[b], order[a]
        else:
            order = [place % ref.rank for place in self.argument("dims")]
        if order == list(range(ref.rank)):
            return ref
        if (ref.form, order) == ("first", [0, 2, 3, 1]):
            return replace(ref, form="last")
        if (ref.form, order) == ("last", [0, 3, 1, 2]):
            return replace(ref, form="first")
        channels = ref.rank if ref.form == "flat" else ref.rank - 2
        if ref.form == "last" or order[0] != 0 or order[channels:] != list(range(channels, ref.rank)):
            raise self.error(f"{self.operator} {order} moves places about")
        return self._view(ref, ref.shape[1:-2], ref.form, order=[place - 1 for place in order[1:channels]])

    def _view(self, ref: Ref, axes: Sequence[int], form: str, **order: Sequence[int]) -> Ref:
        """A value's channel axes regrouped as `axes`, which then stand in another `order`."""
        made = [axes[place] for place in order.get("order", range(len(axes)))]
        shape, rank = (1, *made, *ref.shape[-2:]), len(ref.shape) - 3
        return self._enter("view", [ref], shape, form, axes=list(axes), rank=rank, **order)

    def _enter(
        self, op: str, refs: list[Ref], shape: tuple[int, ...], form: str, tensors: Any = None, **options: Any
    ) -> Ref:
        nodes, inputs = self.record.nodes, tuple(ref.node.name for ref in refs)
        nodes.append(Node(f"{op}_{len(nodes)}", op, inputs, tensors or {}, options, shape, self.layer))
        return Ref(nodes[-1], form, OPERATORS[op].is_pool or all(ref.is_vector for ref in refs))


READERS: dict[str, Callable[[Call], Any]] = {  # by the name of an operator of PyTorch's
    "stack": Call.stacked,
    **dict.fromkeys(SHAPES | MOVES, Call.reshaped),
}


def reads(*names: str) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    """Enter a function that reads these operators of PyTorch's, see `graph/reading.py`."""

    def enter(function: Callable[[Call], Any]) -> Callable[[Call], Any]:
        READERS.update(dict.fromkeys(names, function))
        return function

    return enter
