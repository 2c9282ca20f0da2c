"""What a pass runs of a layout: all of its sites, or in a step of a refinement the new ones alone (P4).

The layers are the same in both. Only what reaches across sites (3x3 convolutions, strided shortcuts, densify,
pooling) asks its step to `complete` its rows; everything else runs on the rows it is given.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from sparse_seg.sparse.layout import SiteLayout
from sparse_seg.sparse.neighbours import NeighbourTable


class Memory:
    """The rows that layers have read so far, by layer.

    Args:
        dtype: what they are kept in, for instance float16; None keeps the rows themselves, not copies.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self._kept: dict[Hashable, Tensor] = {}
        self._read: set[Hashable] = set()  # by which layers in this step
        # rows of this step -> (themselves, so that their id stays theirs; completed; as kept): layers that
        # read the same rows share them
        self._step: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def copy(self) -> Memory:
        """An independent copy."""
        other = Memory(self.dtype)
        other._kept = dict(self._kept)
        return other

    def start_step(self) -> None:
        """The rows that follow belong to new sites."""
        self._step.clear()
        self._read.clear()

    def complete(self, rows: Tensor, src: Step, key: Hashable) -> Tensor:
        """All rows of `src`, those kept under `key` and `rows` of its new sites; kept for the next step.

        Raises:
            ValueError: the key was used before in this step: two layers would share one memory.
        """
        if key in self._read:
            raise ValueError(f"{key} asks for its rows twice in one step; each layer needs a key of its own")
        self._read.add(key)
        if id(rows) not in self._step:
            kept = self._kept.get(key)
            whole = rows if kept is None else src.merge(kept.to(rows.dtype), rows)
            self._step[id(rows)] = rows, whole, whole.to(self.dtype or whole.dtype)
        _, whole, self._kept[key] = self._step[id(rows)]
        return whole

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows kept; those that several layers read count once."""
        storages = {kept.untyped_storage().data_ptr(): kept.untyped_storage() for kept in self._kept.values()}
        return sum(storage.nbytes() for storage in storages.values())


class Step:
    """Sites of a layout that one run of the layers computes, and how.

    Args:
        layout: all sites after this step.
        memory: what layers have read in earlier steps; None: this is the only step, nothing is kept.
        before: sites after the step before, all of them sites of `layout`; only those that it lacks are run.
            None: all are run. Its grid may be coarser.
        exchange, engine: override the layers' own, see `SelectiveConv2d`.
    """

    def __init__(
        self,
        layout: SiteLayout,
        memory: Memory | None = None,
        before: SiteLayout | None = None,
        exchange: str | None = None,
        engine: str | None = None,
    ) -> None:
        self.layout, self.memory, self.exchange, self.engine = layout, memory, exchange, engine
        self.runs_lattice = before is None
        self._new: Tensor | None = None  # rows of the sites that are run; None: all
        self._tables: dict[Hashable, NeighbourTable] = {}
        if before is not None:
            known = before.rows_of_cells(layout)
            self._new = (known < 0).nonzero().squeeze(1)
            self._kept = (known >= before.num_lattice).nonzero().squeeze(1)
            self._kept_from = known[self._kept]

    @staticmethod
    def of(sites: SiteLayout | Step) -> Step:
        """A step as it is; of a layout, the step that runs all of its sites."""
        return sites if isinstance(sites, Step) else Step(sites)

    @staticmethod
    def of_all(sites: Sequence[SiteLayout | Step]) -> list[Step]:
        """Steps of several stages; those that share a layout share its step."""
        steps = {one: Step.of(one) for one in sites}
        return [steps[one] for one in sites]

    @property
    def num_run(self) -> int:
        """How many sites are run."""
        return self.layout.num_sites if self._new is None else self._new.shape[0]

    @cached_property
    def run_cells(self) -> Tensor:
        """`[num_run]` int64: flat cells of the finest grid, in row order, of the sites that are run."""
        return self.layout.cells if self._new is None else self.layout.cells[self._new]

    def complete(self, rows: Tensor, src: Step, key: Hashable) -> Tensor:
        """All rows `[src.layout.num_sites, C]` that a layer (`key`) with outputs on our sites reads, given
        those `[src.num_run, C]` that this run made."""
        return rows if self.memory is None else self.memory.complete(rows, src, key)

    def merge(self, kept: Tensor, rows: Tensor) -> Tensor:
        """All rows `[N, C]`, from those known before and those `[num_run, C]` of new sites."""
        if self._new is None:
            return rows
        if not self._new.shape[0]:
            return kept
        layout = self.layout
        whole = rows.new_empty(layout.num_sites, rows.shape[1])
        whole[: layout.num_lattice] = kept[: layout.num_lattice]
        if self._kept.shape[0]:
            whole.index_copy_(0, self._kept, kept.index_select(0, self._kept_from))
        return whole.index_copy_(0, self._new, rows)

    def neighbours(self, src: Step, spacing: int, exchange: str) -> NeighbourTable:
        """The rows of `src` around the extra sites run here (cached), see `SiteLayout.neighbours`; around all
        sites where `src.layout.separates(exchange)`.

        Raises:
            ValueError: it does, and this is a step that runs new sites only.
        """
        every = src.layout.separates(exchange)
        if self._new is None:
            return src.layout.neighbours(self.layout, spacing, exchange, every)
        if every:
            raise ValueError("exchange separate makes all sites depend on the mask: none can be kept")
        key = src.layout, spacing, exchange
        if key not in self._tables:
            self._tables[key] = src.layout.neighbours_of_cells(self.run_cells, spacing, exchange)
        return self._tables[key]

    def rows_at(self, src: Step) -> Tensor | None:
        """`[num_run]` int64: the row of `src` at each site that is run; None where both are the same.

        Raises:
            ValueError: a site where `src` has none, or a stride that does not fit.
        """
        if src.layout is self.layout:
            return None
        return src.layout.rows_at(self.layout, None if self._new is None else self.run_cells)

    def __repr__(self) -> str:
        return f"Step({self.num_run} of {self.layout})"
