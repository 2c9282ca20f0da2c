"""Where a graph's values and taps lie, in pixels, and which part of it can run on sites.

A convolution's taps lie `dilation x stride of its input` apart; that does not depend on the output stride at
which the network was captured, so one graph runs dense at any stride, and mixed. Each value has a *natural
stride*: the largest at which all that reads it finds its taps. Values are

- `early`: those whose natural stride is at most the finest of the strides. They are dense.
- `rows`: those with a larger one: taps a multiple of it never mix phases. They have a lattice, at the natural
  stride but at most the coarsest, and extra sites where a mask asks for them.
- `late`: from a resizing on, or from a window behind the rows whose taps mix phases, be it those of coarser
  strides alone: a head's window of neighbouring cells, where the finest stride is smaller than the captured
  one. They are dense again.
- `vector`: one of each image; one that is made of late values is late, too.

A window that mixes phases between windows on rows is *mixing*: it reads densified rows everywhere, so the
lattice comes to depend on the mask, and P1 and P4 of docs/method.md do not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from sparse_seg.errors import SparseSegError
from sparse_seg.graph.rewrite import fuse_epilogues
from sparse_seg.graph.strides import ANY, Strides
from sparse_seg.ops import OPERATORS, Graph, Node
from sparse_seg.sites import Taps

NEAR = 3  # cells: taps up to so far share ghosts made for near cells only


class NotSelective(SparseSegError):
    """No part of a network can run on sites; the message says why and what would change it."""


class Geometry(Strides):
    """The geometry of a graph for given strides.

    Args:
        graph: without padding layers.
        strides: px, finest first, each twice the one before; None: the network's own output stride, and twice
            that.
        trained: output stride, px, whose offset the first upsampling behind the rows keeps; None: as
            captured.

    Attributes:
        kind: `early`, `rows`, `late` or `vector` of each value.
        natural: natural stride of each value that is no vector and not late.

    Raises:
        NotSelective: no value is on rows.
        UnknownOperator: a geometry that cannot be.
    """

    def __init__(
        self, graph: Graph, strides: Sequence[int] | None = None, trained: int | None = None
    ) -> None:
        super().__init__(graph)
        self._trained = trained
        self.strides = tuple(strides) if strides is not None else (self.own, 2 * self.own)
        self.mixing: set[str] = set()
        self.kind: dict[str, str] = {}
        self._cells: dict[int, dict[str, int]] = {}
        self._divide()
        self.natural = self._natural()
        for name, stride in self.natural.items():
            self.kind[name] = "rows" if stride > self.strides[0] else "early"
        self._require_windows()

    # -- which part is on rows -----------------------------------------------------------------------------

    def _divide(self) -> None:
        """Which values are late, and which windows mix phases."""
        clean = set[str]()  # windows on rows: their phases never mix
        deep = set[str]()  # these, and what is made of them, grids and vectors
        behind = set[str]()  # from a resizing or whole images on
        apart: dict[str, int] = {}  # px; how far the taps of windows on rows that it is made of are
        for node in self.graph.nodes:
            name, operator, grids = node.name, OPERATORS[node.op], self._grids(node)
            apart[name] = max((apart[one] for one in grids), default=0)
            grids_deep, any_deep = (not deep.isdisjoint(names) for names in (grids, node.inputs))
            any_behind = not behind.isdisjoint(node.inputs)
            if not self.captured[name] and not (operator.is_pool and operator.needs_grid):
                self.kind[name] = "vector"
                if any_deep or any_behind:
                    deep.add(name)
                continue
            ends = node.op == "resize" or operator.is_pool or (operator.needs_grid and grids_deep)
            gated = any_deep and not grids_deep  # an early grid by a vector of rows
            if ends or gated or any_behind:
                behind.add(name)
            elif self.distances.get(name, 0) > self.strides[0]:
                clean.add(name)
                apart[name] = max(apart[name], min(self.distances[name], self.strides[-1]))
            if grids_deep or name in clean:
                deep.add(name)
        before_clean = set[str]()
        for node in reversed(self.graph.nodes):
            users = [user.name for user in self.users[node.name] if self.captured[user.name]]
            if any(user in before_clean or user in clean for user in users):
                before_clean.add(node.name)
            elif node.name in clean and self.distances[node.name] < min(apart[node.name], self.own + 1):
                clean.remove(node.name)  # on rows it would bound the lattices of all that it is made of
        for node in self.graph.nodes:
            name, reads_late = node.name, any(self.kind.get(one) == "late" for one in node.inputs)
            is_vector = self.kind.get(name) == "vector"
            mixes = not is_vector and name in self.distances and name in deep and name not in clean
            if node.options.get("cell") or (mixes and name in before_clean and name not in behind):
                self.mixing.add(name)
            elif mixes or name in behind or reads_late:
                self.kind[name] = "late"

    def _natural(self) -> dict[str, int]:
        natural: dict[str, int] = {}
        for node in reversed(self.graph.nodes):
            name, captured = node.name, self.captured[node.name]
            if self.kind.get(name) in ("vector", "late"):
                continue
            bounds = [node.options.get("natural", ANY)]
            kept = captured if captured < self.own else ANY  # by who reads all places
            if OPERATORS[node.op].needs_grid:
                bounds.append(captured)
            for user in self.users[name]:
                operator = OPERATORS[user.op]
                if operator.is_pool and self._gated(user, natural) <= self.strides[0]:
                    bounds.append(captured)  # a gate of early values is early
                elif operator.needs_grid and user.name in natural:
                    bounds.append(natural[user.name])  # before the rows, where all is early
                elif operator.is_pool or operator.needs_grid or self.kind.get(user.name) == "late":
                    bounds.append(kept)
                elif user.name in natural:
                    bounds.append(natural[user.name])
                    mixes_late = user.name in self.mixing and self.spacing(user) >= self.own
                    if user.name in self.distances and not mixes_late:
                        bounds.append(self.distances[user.name])
            if name == self.graph.output:
                bounds.append(kept)
            natural[name] = min(bounds)
        return natural

    def _gated(self, vector: Node, natural: dict[str, int]) -> int:
        """The smallest natural stride of the values that a vector is part of."""
        strides = [ANY]
        for user in self.users[vector.name]:
            is_vector = self.kind.get(user.name) == "vector"
            strides.append(self._gated(user, natural) if is_vector else natural.get(user.name, ANY))
        return min(strides)

    def _require_windows(self) -> None:
        for node in self.graph.nodes:
            stride = self.captured[node.name]
            if OPERATORS[node.op].needs_grid and self.kind[node.name] == "rows":
                raise NotSelective(
                    f"{node.where} reads all places of an image, at {stride} px: at the strides "
                    f"{list(self.strides)} it would be on sites; the finest may be {stride}"
                )
            if stride > self.own and node.name in self.natural:
                raise NotSelective(
                    f"{node.where} is at {stride} px, behind an upsampling from {self.own}: "
                    "a network of several branches at once, as HRNet, cannot run selectively"
                )
        for node in self.graph.nodes:
            if node.name in self.distances and self.kind[node.inputs[0]] == self.kind[node.name] == "rows":
                return
        finest, coarsest = self.strides[0], self.strides[-1]
        parts = self.graph.own_code
        own = f"; {parts[0]} runs by its own code, and all behind it is dense" if parts else ""
        before = (node for node in self.graph.nodes if node.name not in self._behind_resizing)
        widest = max((node for node in before if node.op == "conv2d"), key=self.spacing, default=None)
        most = f"{self.spacing(widest)} px apart ({widest.where})" if widest else "0 px apart"
        raise NotSelective(
            f"nothing of this network can run selectively at strides {finest} and {coarsest}: its "
            f"convolutions' taps lie at most {most} before its first upsampling, and must lie "
            f"{2 * finest} px apart; "
            "build it with dilation in place of strides (output stride 8 or 16), or give smaller strides, "
            "at which its weights are less accurate than at its own" + own
        )

    def trained(self, name: str) -> int:
        """Stride, px, whose offset an upsampling of a value keeps: that at which the network was trained."""
        captured = self.captured[name]
        first = captured == self.own and name not in self._behind_resizing
        return self._trained if first and self._trained is not None else captured

    @cached_property
    def _behind_resizing(self) -> set[str]:
        return self._flow(lambda node: node.op == "resize")

    def _flow(
        self, starts: Callable[[Node], bool], through: Callable[[Node], bool] = lambda node: True
    ) -> set[str]:
        """Values where something starts, and those `through` which it is handed on to their readers."""
        found = set[str]()
        for node in self.graph.nodes:
            if starts(node) or (through(node) and not found.isdisjoint(node.inputs)):
                found.add(node.name)
        return found

    def of_kind(self, kind: str) -> list[Node]:
        """The nodes that make values of a kind, in order."""
        return [node for node in self.graph.nodes if self.kind[node.name] == kind]

    @property
    def vectors(self) -> list[str]:
        return [node.name for node in self.of_kind("vector")]

    @property
    def where_mixing(self) -> str:
        """For messages: the first window that mixes phases."""
        return next(node.where for node in self.graph.nodes if node.name in self.mixing)

    def part(self, name: str) -> str:
        """Where a value's multiply-adds are counted: `early`, `rows` or `late`."""
        kind = self.kind[name]
        return kind if kind != "vector" else "early" if name in self.first else "rows"

    # -- as it runs ----------------------------------------------------------------------------------------

    def lattice(self, name: str) -> int:
        """Stride of the lattice of a value on rows."""
        return min(self.natural[name], self.strides[-1])

    @cached_property
    def refines(self) -> bool:
        """Whether the lattice does not depend on the mask (P1), so that a coarse pass can be refined (P4)."""
        return not self.mixing

    @cached_property
    def final_pools(self) -> set[str]:
        """Poolings of rows behind which neither a window on rows nor another pooling comes, as a head's last.

        They weigh all sites by area; the others, as a backbone's last squeeze-and-excite, read the lattice.
        """
        reach, pools = set[str](), set[str]()
        for node in reversed(self.graph.nodes):
            on_rows = self.kind[node.name] == "rows" and node.name in self.distances
            pools_rows = OPERATORS[node.op].is_pool and self.kind.get(node.inputs[0]) == "rows"
            behind = any(user.name in reach for user in self.users[node.name])
            if pools_rows and not behind:
                pools.add(node.name)
            if on_rows or pools_rows or behind:
                reach.add(node.name)
        return pools

    @cached_property
    def masked(self) -> set[str]:
        """Values on rows and vectors that depend on the mask at the lattice, too."""
        starts = self.final_pools | self.mixing
        return self._flow(lambda node: node.name in starts, lambda node: self.kind[node.name] != "late")

    @cached_property
    def features(self) -> str:
        """What a policy looks at: a last early feature, else the last early value that rows read."""
        early = self.of_kind("early")
        marked = [node.name for node in early if "natural" in node.options]
        on_rows = {node.name for node in self.of_kind("rows")}
        read = [node.name for node in early if any(user.name in on_rows for user in self.users[node.name])]
        return (marked or read)[-1]

    def cells(self, stride: int) -> dict[str, int]:
        """Each value's stride where the network runs dense at an output stride, px; 0 of vectors."""
        if stride in self._cells:
            return self._cells[stride]
        cells: dict[str, int] = {}
        for node in self.graph.nodes:
            name = node.name
            if name in self.natural:
                cells[name] = min(self.natural[name], stride)
            elif not self.captured[name]:
                cells[name] = 0
            elif node.op == "resize":
                captured = self.captured[name]
                cells[name] = captured if captured < self.own else max(1, captured * stride // self.own)
            else:
                window = OPERATORS[node.op].window(node)
                step = 1 if window is None else window.stride[0]
                cells[name] = step * max(cells[one] for one in self._grids(node))
        self._cells[stride] = cells  # whole: others may read it at once
        return cells

    def near(self, size: tuple[int, int]) -> dict[int, list[Taps]]:
        """Taps that share the ghosts of near cells, by the stride of a level, for images of `size` px."""
        near: dict[int, list[Taps]] = {stride: [] for stride in self.strides[:-1]}
        for node in self.of_kind("rows"):
            source = node.inputs[0]
            if node.name not in self.distances or node.name in self.mixing or self.kind[source] != "rows":
                continue
            taps, _ = self.inside(node, size)
            for stride, shared in near.items():
                if self.lattice(source) > stride and taps.reach <= NEAR * 2 * stride and taps not in shared:
                    shared.append(taps)
        return near

    # -- what runs share -----------------------------------------------------------------------------------

    @cached_property
    def first(self) -> set[str]:
        """Early values, and vectors made of such alone."""
        kind = self.kind
        behind = self._flow(
            lambda node: kind[node.name] in ("rows", "late"), lambda node: kind[node.name] == "vector"
        )
        return self.nodes.keys() - behind

    @cached_property
    def overwritable(self) -> set[str]:
        """Values that nothing but the next node reads, in memory that is theirs alone."""
        fresh = (node for node in self.graph.nodes if node.op in ("conv2d", "batch_norm", "add"))
        return {
            node.name for node in fresh if len(self.users[node.name]) == 1 and node.name != self.graph.output
        }

    @cached_property
    def fused(self) -> list[Node]:
        """The nodes, those behind a convolution on rows as part of it, see `rewrite.fuse_epilogues`."""

        def fits(node: Node) -> bool:
            one = self.kind[node.name] == "rows" and node.name not in self.masked
            return one and node.options.get("groups", 1) in (1, node.shape[1])

        return fuse_epilogues(self.graph, fits).nodes

    @cached_property
    def entries(self) -> set[str]:
        """Those of them that others read, and a policy."""
        read = {name for node in self.graph.nodes if node.name not in self.first for name in node.inputs}
        return (read & self.first) | {self.features, self.graph.nodes[0].name}

    @cached_property
    def kept_lattices(self) -> set[str]:
        """Values of a coarse pass that a mixed run reads."""

        def reads(node: Node, user: Node) -> bool:
            return self._reads_sites(node, user) or self.lattice(user.name) > self.lattice(node.name)

        return (self._kept("rows", reads) - self.masked) | set(self.vectors)

    @cached_property
    def kept_rows(self) -> set[str]:
        """Values of a mixed run that a later one, with more sites, reads; and what a head's loss reads."""
        return self._kept("rows", self._reads_sites) | set(self.vectors)

    @cached_property
    def kept_late(self) -> set[str]:
        """Late values of a coarse pass that late ones in fine blocks read, or that are the output."""
        return self._kept("late", lambda _, user: user.op == "resize" or user.name in self.distances)

    def _kept(self, kind: str, reads: Callable[[Node, Node], bool]) -> set[str]:
        """The values of a kind of which some user `reads` more, and the output if it is one."""
        return {
            node.name
            for node in self.of_kind(kind)
            if node.name == self.graph.output or any(reads(node, user) for user in self.users[node.name])
        }

    def _reads_sites(self, node: Node, user: Node) -> bool:
        """Whether a user reads other rows than its own."""
        others = self.distances.keys() | self.masked
        return self.kind[user.name] in ("late", "vector") or user.name in others

    @cached_property
    def exits(self) -> list[str]:
        """Values on rows that late ones read, or that are the output."""
        read = {name for node in self.of_kind("late") for name in node.inputs} | {self.graph.output}
        return [node.name for node in self.of_kind("rows") if node.name in read]
