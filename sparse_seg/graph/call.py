"""A call of PyTorch's, as a family's reader sees it (`ops.READERS`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparse_seg.ops import OPERATORS, Node, UnknownOperator

if TYPE_CHECKING:
    from sparse_seg.graph.reading import Reader


@dataclass(frozen=True)
class Ref:
    """A value as PyTorch's graph has it.

    form: `first`, axes as in `Node.shape`; `last`, channels last; `flat`, a vector without height and width.
    """

    name: str
    form: str = "first"


@dataclass(frozen=True)
class Constant:
    """A tensor of the network's, perhaps in another shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Unknown:
    """What no operator here makes; an error once the output needs it."""

    message: str
    layers: tuple[str, ...] = ()


class Call:
    """What a family's reader asks of one call of an operator of PyTorch's.

    Args:
        arguments: by name, in the operator's order.
        layer: that calls it.

    Attributes:
        tensors: that it reads; shapes: of what it gives.
    """

    def __init__(self, reader: Reader, operator: str, arguments: dict[str, Any], layer: str) -> None:
        self.reader, self.operator, self.layer = reader, operator, layer
        self.names, self._arguments = list(arguments), arguments
        self.tensors = list(_tensors(arguments.values()))
        self.shapes: list[tuple[int, ...]] = []

    @property
    def where(self) -> str:
        return self.layer or "the network"

    @property
    def first(self) -> str:
        """Name of the first argument."""
        return self.names[0]

    def argument(self, name: str, default: Any = None) -> Any:
        return self._arguments.get(name, default)

    def is_value(self, name: str) -> bool:
        return isinstance(self.reader.known(self.argument(name)), Ref)

    def is_vector(self, name: str) -> bool:
        return self._ref(name).name in self.reader.vectors

    def are_grids(self, name: str) -> bool:
        """Whether a list has nothing but grids whose axes are as in `Node.shape`."""
        return all(ref.form == "first" and ref.name not in self.reader.vectors for ref in self._refs([name]))

    def is_last(self, name: str) -> bool:
        """Whether a value's channels are its last axis."""
        ref = self._ref(name)
        return ref.form == "last" or (ref.form == "flat" and len(self.value_shape(name)) == 4)

    def tensor(self, name: str) -> str | None:
        """The state dict's name of a tensor; None where there is none."""
        argument = self.argument(name)
        if argument is None:
            return None
        found = self.reader.known(argument)
        if not isinstance(found, Constant):
            raise UnknownOperator(f"{self.where}: the {name} of {self.operator} is computed, not a parameter")
        return found.name

    def beside(self, tensor: str | None, name: str) -> str | None:
        """Another tensor of the same module, by its name there."""
        wanted = f"{(tensor or '').rpartition('.')[0]}.{name}".lstrip(".")
        return wanted if self.reader.named(wanted) else None

    def shape_of(self, tensor: str | None) -> tuple[int, ...]:
        for argument in self._arguments.values():
            found = self.reader.known(argument)
            if isinstance(found, Constant) and found.name == tensor:
                return found.shape
        raise KeyError(tensor)

    def value_shape(self, name: str) -> tuple[int, ...]:
        """As `Node.shape`."""
        return self.reader.nodes[self._ref(name).name].shape

    def channel_axis(self, axis: int, name: str) -> int:
        """An axis of a value as an axis of `Node.shape`."""
        ref, shape = self._ref(name), self.value_shape(name)
        rank = len(shape) - (2 if ref.form == "flat" else 0)
        axis = axis + rank if axis < 0 else axis
        return {1: 2, 2: 3, 3: 1}.get(axis, axis) if ref.form == "last" else axis

    def channel_axes(self, shape: Sequence[int], name: str) -> list[int]:
        """A tensor's channel axes where it is combined with a value at every place."""
        ref, value = self._ref(name), self.value_shape(name)
        if math.prod(shape) == 1:
            return [1] * (len(value) - 3)
        if ref.form == "first":
            full = [1] * (len(value) - len(shape)) + list(shape)
            if full[0] == 1 and full[-2:] == [1, 1]:
                return full[1:-2]
        else:
            full = [1] * (len(value) - 2 - len(shape)) + list(shape)
            if len(value) == 4 and math.prod(shape) == shape[-1]:
                return [int(shape[-1])]
        raise UnknownOperator(f"{self.where}: a tensor {list(shape)} that differs from place to place")

    def result_shapes(self) -> list[tuple[int, ...]]:
        """Of an operator with several results, as `Node.shape`."""
        form = self._ref(self.first).form
        return [_canonical(shape, form) for shape in self.shapes]

    def same(self, name: str) -> Ref:
        """The value itself."""
        return self._ref(name)

    def make(self, op: str, inputs: list[str], tensors: dict[str, str | None], **options: Any) -> Ref:
        """Enter a node that reads these arguments."""
        refs = self._refs(inputs)
        grids = [ref for ref in refs if ref.name not in self.reader.vectors]
        form = (grids or refs)[0].form
        found = self.shapes[0]
        if OPERATORS[op].is_pool:
            rank = len(self.reader.nodes[refs[0].name].shape)
            form = form if len(found) == rank else "flat"
        return self._enter(
            self.reader.unique(self.operator), op, refs, tensors, _canonical(found, form), form, options
        )

    def part(self, op: str, inputs: list[str], shape: tuple[int, ...], **options: Any) -> Ref:
        """One of several results."""
        refs = self._refs(inputs)
        return self._enter(self.reader.unique(self.operator), op, refs, {}, shape, refs[0].form, options)

    def reshaped(self) -> Any:
        """The result of an operator that changes axes alone."""
        found, out = self.reader.known(self.tensors[0]), self.shapes[0]
        if isinstance(found, Constant):
            if self.operator in ("permute", "transpose") or math.prod(out) != math.prod(found.shape):
                raise UnknownOperator(f"{self.where}: a parameter that is moved about")
            return replace(found, shape=out)
        assert isinstance(found, Ref)
        shape, form = self.reader.nodes[found.name].shape, found.form
        if self.operator in ("permute", "transpose"):
            return self._permuted(found, shape)
        if found.name in self.reader.vectors:
            tail = len(out) >= 4 and (out[-2:] == (1, 1) or self.operator in ("expand", "expand_as"))
            axes, form = (out[1:-2], "first") if tail else (out[1:], "flat")
        elif form == "first" and out[-2:] == shape[-2:]:
            axes = out[1:-2]
        else:
            raise UnknownOperator(f"{self.where}: {self.operator} to {list(out)} moves places about")
        if out[0] != 1 or math.prod(axes) != math.prod(shape[1:-2]):
            raise UnknownOperator(f"{self.where}: {self.operator} from {list(shape)} to {list(out)}")
        if tuple(axes) == shape[1:-2]:
            return Ref(found.name, form)
        options = {"axes": list(axes), "rank": len(shape) - 3}
        return self._enter(
            self.reader.unique("view"), "view", [found], {}, (1, *axes, *shape[-2:]), form, options
        )

    def stacked(self) -> Ref:
        """Values of one channel axis, joined along a new one before it."""
        refs, shape = self._refs(["tensors"]), self.shapes[0]
        if self.argument("dim", 0) != 1 or len(shape) != 5 or any(ref.form != "first" for ref in refs):
            raise UnknownOperator(f"{self.where}: values stacked along another axis than the channels")
        joined = (1, shape[1] * shape[2], *shape[3:])
        row = self._enter(self.reader.unique("cat"), "cat", refs, {}, joined, "first", {})
        options = {"axes": list(shape[1:3]), "rank": 1}
        return self._enter(self.reader.unique("view"), "view", [row], {}, shape, "first", options)

    def _permuted(self, ref: Ref, shape: tuple[int, ...]) -> Ref:
        rank = len(shape) - (2 if ref.form == "flat" else 0)
        if self.operator == "transpose":
            order = list(range(rank))
            a, b = (self.argument(name) % rank for name in ("dim0", "dim1"))
            order[a], order[b] = order[b], order[a]
        else:
            order = [place % rank for place in self.argument("dims")]
        if order == list(range(rank)):
            return ref
        if (ref.form, order) == ("first", [0, 2, 3, 1]):
            return Ref(ref.name, "last")
        if (ref.form, order) == ("last", [0, 3, 1, 2]):
            return Ref(ref.name, "first")
        channels = rank if ref.form == "flat" else rank - 2
        if ref.form == "last" or order[0] != 0 or order[channels:] != list(range(channels, rank)):
            raise UnknownOperator(f"{self.where}: {self.operator} {order} moves places about")
        places = [place - 1 for place in order[1:channels]]
        axes = list(shape[1:-2])
        options = {"axes": axes, "order": places, "rank": len(axes)}
        made = (1, *(axes[place] for place in places), *shape[-2:])
        return self._enter(self.reader.unique("view"), "view", [ref], {}, made, ref.form, options)

    def _enter(
        self,
        name: str,
        op: str,
        refs: list[Ref],
        tensors: Mapping[str, str | None],
        shape: tuple[int, ...],
        form: str,
        options: dict[str, Any],
    ) -> Ref:
        known = {role: tensor for role, tensor in tensors.items() if tensor is not None}
        inputs = tuple(ref.name for ref in refs)
        made = Node(name, op, inputs, known, options, shape, self.layer)
        self.reader.nodes[name] = made
        if OPERATORS[op].is_pool or (inputs and all(one in self.reader.vectors for one in inputs)):
            self.reader.vectors.add(name)
        return Ref(name, form)

    def _ref(self, name: str) -> Ref:
        return self._refs([name])[0]

    def _refs(self, names: Sequence[str]) -> list[Ref]:
        refs = []
        for name in names:
            argument = self.argument(name)
            for one in argument if isinstance(argument, (list, tuple)) else [argument]:
                found = self.reader.known(one)
                if not isinstance(found, Ref):
                    raise UnknownOperator(f"{self.where}: {self.operator} of what is no value of the image")
                refs.append(found)
        return refs


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments."""
    for one in values:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (list, tuple)):
            yield from _tensors(one)


def _canonical(shape: tuple[int, ...], form: str) -> tuple[int, ...]:
    """As `Node.shape`."""
    if form == "last":
        return (shape[0], shape[3], shape[1], shape[2])
    return (*shape, 1, 1) if form == "flat" else shape
