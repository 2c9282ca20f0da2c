"""Sites computed step by step: a step runs its new sites alone and reads what earlier steps kept (P4).

The layers are the same as in one pass. Only what reaches across sites (3x3 convolutions, strided shortcuts,
densify, pooling) asks the layout to `complete` its rows; everything else runs on the new rows as they are.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property

import torch
from torch import Tensor

from sparse_seg.sparse.layout import SiteLayout


class Memory:
    """The rows that layers have read so far, by layer.

    Args:
        dtype: what they are kept in, for instance float16; None keeps the rows themselves, not copies.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self._kept: dict[Hashable, Tensor] = {}
        # rows of this step -> (themselves, so that their id stays theirs; completed; as kept): layers that
        # read the same rows share them
        self._step: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def copy(self) -> Memory:
        """A memory of the same rows that goes its own way from here."""
        other = Memory(self.dtype)
        other._kept = dict(self._kept)
        return other

    def start_step(self) -> None:
        """What follows are rows of new sites."""
        self._step.clear()

    def complete(self, rows: Tensor, src: SiteLayout, key: Hashable) -> Tensor:
        """All rows of `src`, those kept under `key` and `rows` of its new sites; kept for the next step."""
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


class StepLayout(SiteLayout):
    """A layout of which only the sites that `before` lacks are run; without `before` all are.

    Args:
        layout: all sites after this step.
        memory: shared by all layouts and steps of a pass.
        before: sites after the step before, all of them sites of `layout`. Its grid may be coarser.
    """

    def __init__(self, layout: SiteLayout, memory: Memory, before: SiteLayout | None = None) -> None:
        vars(self).update(vars(layout))  # a layout does not change: its numbering and tables are shared
        for name in ("run_cells", "run_places"):  # what depends on the sites that are run
            vars(self).pop(name, None)
        self._memory, self.runs_lattice = memory, before is None
        self._new: Tensor | None = None
        if before is not None:
            known = before.rows_of_cells(self)
            self._new = (known < 0).nonzero().squeeze(1)
            self._kept = (known >= before.num_lattice).nonzero().squeeze(1)
            self._kept_from = known[self._kept]

    @cached_property
    def run_cells(self) -> Tensor:
        return self.cells if self._new is None else self.cells[self._new]

    @property
    def num_run(self) -> int:
        return self.num_sites if self._new is None else self._new.shape[0]

    remembers = True

    def complete(self, rows: Tensor, src: SiteLayout, key: Hashable) -> Tensor:
        return self._memory.complete(rows, src, key)

    def merge(self, kept: Tensor, rows: Tensor) -> Tensor:
        assert self._new is not None
        whole = rows.new_empty(self.num_sites, rows.shape[1])
        whole[: self.num_lattice] = kept[: self.num_lattice]
        if self._kept.shape[0]:
            whole.index_copy_(0, self._kept, kept.index_select(0, self._kept_from))
        return whole.index_copy_(0, self._new, rows)
