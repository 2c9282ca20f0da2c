"""What an operator says of itself, and the table of all operators.

The channels of a value are its axes from 1 on, in every form: a grid is `[B, C, h, w]`, rows of extra sites
are `[N, C]`, a vector of each image `[B, C, 1, 1]`. So what treats each place by itself is written once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from sparse_seg.errors import SparseSegError
from sparse_seg.ops.node import Node
from sparse_seg.sites.level import sum_rows

Tensors = Mapping[str, Tensor]
Pair = tuple[int, int]  # along y and x
Pads = tuple[int, int, int, int]  # places left, right, above, below; negative: cut off


class UnknownOperator(SparseSegError):
    """The network has an operator that no family knows; the message names it and where it stands.

    Attributes:
        layers: the modules in which such operators stand, as far as they are known.
    """

    def __init__(self, message: str, layers: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.layers = list(layers)


class Operator:
    """An operator that treats each place by itself; the base of all.

    Attributes:
        is_pool: reads all places of an image and gives a vector.
        needs_grid: runs on complete grids alone: sites end before it.
        joins: in training runs once over all sites, as batch norm's statistics need.
        skips_outside: what lies outside the image adds nothing to a window, so taps that always do are left
            out, with their part of the `weight` `[O, I, kh, kw]`.
    """

    is_pool: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    joins: ClassVar[bool] = False
    skips_outside: ClassVar[bool] = False

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        """The value from those that it reads, all of one form: grids, or rows."""
        raise NotImplementedError

    def overwrite(self, node: Node, inputs: list[Tensor]) -> Tensor | None:
        """The value in the memory of the first that it reads; None where it needs memory of its own."""
        return None

    def window(self, node: Node) -> Window | None:
        """What it reads around each place; None: the place itself."""
        return None

    def macs(self, node: Node, tensors: Tensors) -> int:
        """Multiply-adds at each place that it writes."""
        return 0

    def check(self, node: Node, tensors: Tensors) -> None:
        """Raises a ValueError where options cannot be that a run on no images does not find."""


class Function(Operator):
    """A function of the values that it reads; tensors, options and `training` are its keyword arguments.

    Args:
        options: names of those that it takes, as far as the node has them; own: the operator's attributes and
            methods.
    """

    def __init__(self, function: Callable[..., Tensor], *options: str, **own: Any) -> None:
        self.function, self.options = function, options
        vars(self).update(own)

    def apply(self, node: Node, tensors: Tensors, inputs: list[Tensor], training: bool) -> Tensor:
        given = node.options | {"training": training}
        return self.function(
            *inputs, **tensors, **{name: given[name] for name in self.options if name in given}
        )


class Window(NamedTuple):
    """Along each axis (y, x). padding: places outside before the first; None: as TensorFlow's SAME."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int] | None


class Spatial(Operator):
    """An operator that reads a window."""

    def window(self, node: Node) -> Window:
        """As the options kernel, stride, dilation and padding (or `same`) say."""
        kernel, stride, dilation = (pair(node.options[name]) for name in ("kernel", "stride", "dilation"))
        padding = node.options["padding"]
        return Window(kernel, stride, dilation, None if padding == "same" else pair(padding, 0))

    def grid(
        self, node: Node, tensors: Tensors, grid: Tensor, stride: Pair, dilation: Pair, pads: Pads
    ) -> Tensor:
        """On a grid `[B, I, h, w]`, with `pads` places around it that lie outside the image."""
        raise NotImplementedError

    def rows(self, node: Node, tensors: Tensors, reads: Reads) -> Tensor:
        """At extra sites, `[M, O]`, from what the window's taps read there."""
        raise NotImplementedError


@dataclass(frozen=True)
class Reads:
    """What the T taps of a window read at M sites: rows `index` `[M * T]` of `table` `[R, I]`, whose last row
    is what lies outside the image. Backward may keep `parts`, if any, of which `make` makes the table. With
    `shares`, which have no backward, both are `[M * T, k]`, and taps read sums of k rows by their shares."""

    table: Tensor
    index: Tensor
    count: int
    make: Callable[..., Tensor] = lambda table: table
    parts: tuple[Tensor, ...] = ()
    shares: Tensor | None = None

    @property
    def sites(self) -> int:
        """M."""
        return int(self.index.shape[0]) // self.count

    def values(self) -> Tensor:
        """`[M, T, I]`."""
        if self.shares is None:
            taken = self.table.index_select(0, self.index)
        else:
            taken = sum_rows(self.table, self.index, self.shares)
        return taken.reshape(-1, self.count, int(self.table.shape[1]))

    def tiles(self, size: int, by_taps: bool = False) -> Iterator[tuple[slice, slice, Reads]]:
        """Parts of the sites, so many at once that their values take at most `size` bytes; or of the taps,
        and of the sites where those of one tap take more.

        Returns:
            For each the sites, the taps, and what these read there.
        """
        each, sites = int(self.table.shape[1]) * self.table.element_size(), self.sites
        most = min(self.count, max(1, size // (each * max(1, sites)))) if by_taps else self.count
        at_once = max(1, size // (each * most))
        for tap in range(0, self.count, most):
            taps = slice(tap, min(tap + most, self.count))
            for site in range(0, max(1, sites), at_once):
                part = slice(site, min(site + at_once, sites))
                yield part, taps, self._part(part, taps)

    def _part(self, sites: slice, taps: slice) -> Reads:
        both = [one for one in (self.index, self.shares) if one is not None]
        if taps.stop - taps.start == self.count:
            index, *shares = (one[sites.start * self.count : sites.stop * self.count] for one in both)
        else:
            each = (one.reshape(-1, self.count, *one.shape[1:])[sites, taps] for one in both)
            index, *shares = (one.flatten(0, 1) for one in each)
        return Reads(self.table, index, taps.stop - taps.start, shares=shares[0] if shares else None)

    def inside(self) -> Tensor:
        """`[M, T]` bool."""
        last = self.table.shape[0] - 1  # no int(): in an exported graph the number of ghosts is not fixed
        first = self.index if self.shares is None else self.index[:, 0]
        return (first < last).reshape(-1, self.count)


OPERATORS: dict[str, Operator] = {}


def operator(name: str) -> Callable[[type[Operator]], type[Operator]]:
    """Enter an operator into the table."""

    def enter(kind: type[Operator]) -> type[Operator]:
        OPERATORS[name] = kind()
        return kind

    return enter


def function(name: str, **own: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Enter a function as an operator, see `Function`: its arguments behind `*` are tensors and options."""

    def enter(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        OPERATORS[name] = Function(
            call, *inspect.signature(call).parameters, __module__=call.__module__, **own
        )
        return call

    return enter


def pair(value: Any, default: int = 1) -> tuple[int, int]:
    """An option of PyTorch's along y and x: `3`, `[3]` or `[3, 3]`."""
    if value is None or value == [] or value == ():
        return default, default
    if isinstance(value, int):
        return value, value
    first, *rest = value
    return int(first), int(rest[0] if rest else first)


def window_options(kernel: Any, stride: Any = 1, dilation: Any = 1, padding: Any = 0) -> dict[str, Any]:
    """A window's options, of arguments of PyTorch's."""
    along = {"kernel": pair(kernel), "stride": pair(stride), "dilation": pair(dilation)}
    return {name: list(one) for name, one in (along | {"padding": pair(padding, 0)}).items()}
