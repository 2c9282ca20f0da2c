"""A pass of a graph's network over images: nothing is computed before it is asked for, and nothing twice.

A mask policy is given the pass and asks it for what it needs. Where it asks for coarse logits, the pass keeps
the lattices and then adds the sites that the mask asks for, and only those (P4 of docs/method.md).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_seg.masks import MaskPolicy, block_levels, block_shape
from sparse_seg.ops import OPERATORS, Node
from sparse_seg.ops.upsample import at_least_float32, upsample_classes
from sparse_seg.run.images import check_dtype, check_images, warn_of_bytes
from sparse_seg.run.modes import eval_mode
from sparse_seg.run.patch import patched
from sparse_seg.run.values import Interpreter, Values
from sparse_seg.run.way import Way
from sparse_seg.sites import Grid, Mixed, Sites, grid_size

if TYPE_CHECKING:
    from sparse_seg.run.network import SelectiveNetwork


class Pass:
    """One pass of a network over images, dense or under a mask.

    Args:
        model: whose pass it is.
        images: normalised, float `[B, 3, H, W]`, any size from 32x32 up.
        labels: int64 `[B, H, W]`, for policies that read them.

    Raises:
        ValueError: images of a wrong shape or dtype.
    """

    def __init__(self, model: SelectiveNetwork, images: Tensor, labels: Tensor | None = None) -> None:
        check_images(images)
        tensors = model.tensors
        check_dtype(images, tensors.values())
        warn_of_bytes(images)
        self.model, self.labels = model, labels
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.mask: Tensor | None = None  # bool or int64 `[B, Hc, Wc]`
        needed = itertools.chain([images], model.parameters(), model.buffers())  # folded weights are buffers
        self._with_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in needed)
        self._counts: dict[str, int] = {}
        frozen = model.frozen if model.training else ()
        self._run = Interpreter(model.geometry, tensors, self.images, model.training, self._count, frozen)
        self._coarse: Values | None = None  # of the coarse pass that can be refined
        self._sites: Sites | None = None
        self._values: Values | None = None
        self._stride: int | None = None  # of a dense run
        self._values_kept = False  # whether a dense run's are all there that losses read
        self._way = Way()
        self._patched: Grid | None = None  # the logits by merge `patch`

    # -- how to run ----------------------------------------------------------------------------------------

    def follow(self, way: Way | None = None, policy: MaskPolicy | None = None) -> Pass:
        """Run this way; a policy chooses the mask now. Returns the pass itself.

        Args:
            policy: overrides the way's.
        """
        self._way = way = way or Way()
        if way.output_stride is not None:
            self.model.check_way(way)
            self._forget(way.output_stride)
            return self
        policy = policy or self.model.policy_for(way)
        if self._coarse is None or self._stride is not None:
            self._forget()  # a policy that asks for the coarse pass starts what is then refined
        fine_blocks = policy(self)
        finest = self.model.strides[0]
        size = grid_size(self._run.size, finest)
        self._add("mask", policy.macs(size, finest, len(self.images)))
        count = policy.fine_count(fine_blocks[0].numel())
        return self._take(fine_blocks, way, None if count is None else len(self.images) * count)

    def take(self, fine_blocks: Tensor, way: Way | None = None) -> Pass:
        """Run under this mask, see `Predicting.forward`. After a coarse pass, refine it; merge `patch` starts
        one where no gradients are needed.

        Args:
            way: gives exchange rule, engine and merge; its policy is not asked.

        Raises:
            ValueError: a wrong shape or dtype, a block that would become coarser than it is, or exchange
                `separate` after a coarse pass.
            SparseSegError: a merge that the network has not, with this exchange rule.
            EngineError: the engine is spconv, which is missing, broken, or cannot run this dtype or backward.
        """
        return self._take(fine_blocks, way or Way())

    def _take(self, fine_blocks: Tensor, way: Way, count: int | None = None) -> Pass:
        """
        Args:
            count: of the mask's fine blocks, where it is known: a CUDA device is then not waited for.
        """
        self._way = way
        self.model.check_way(way)
        levels, geometry = self._levels(fine_blocks), self.model.geometry
        if self._patches and self._coarse is None and not (self._with_grad or self._run.training):
            self.start_coarse()  # its lattices serve the fine sites, too
        refines = self._coarse is not None and not self._with_grad and geometry.refines
        if refines and self.model.separates(way):
            raise ValueError("exchange separate makes all sites depend on the mask: none can be kept")
        before = self._sites if refines else None
        if before is not None and bool((levels < self.levels).any()):
            raise ValueError("a step can only refine: some block has a lower level than before")
        plans = self.model.plans(len(self.images), self._run.size, self.images.device)
        near, exchange = geometry.near(self._run.size), way.exchange or self.model.exchange
        engine = way.engine or self.model.engine
        known = count if len(plans) == 1 and before is None else None
        sites = Sites.of_mask(levels, plans, exchange, near, before, engine, known)
        coarse = self._coarse if refines else None
        with self.context():
            if self._patches and not self._run.training:
                coarse = self._with_late(coarse)
            earlier = self._values if before is not None else None
            kept = self.model.auxiliary[1:] if self.model.training else ()
            late = not self._patches
            self._values = self._run.mixed(sites, coarse, earlier, late, kept, last=not refines)
            self._patched = patched(self._run, sites, coarse, self._values) if self._patches else None
        self.mask, self._sites, self._stride = fine_blocks.clone(), sites, None  # the caller's may change
        return self

    def fork(self) -> Pass:
        """An independent copy of the pass from here on."""
        other = copy.copy(self)
        other._run = copy.copy(self._run)
        other._counts = dict(self._counts)
        other._run.count = other._count
        return other

    # -- what a policy may ask for -------------------------------------------------------------------------

    def features(self) -> Tensor:
        """`[B, C, h, w]` of the last value before the mask, at the finest stride."""
        geometry = self.model.geometry
        with self.context():
            grid = self._run.early()[geometry.features]
        return grid.thinned(self.model.strides[0])

    @torch.no_grad()
    def coarse_logits(self, every: int = 1, stored_dtype: torch.dtype | None = None) -> Tensor:
        """Logits of the dense network at the coarsest stride, at every `every`-th pixel.

        In eval mode without gradients this pass then refines what was run here. Where the lattice depends on
        the mask (exchange `separate`, or layers that mix phases) it cannot, and where a way to run is chosen
        it must not: the coarse pass is then one of its own, which shares early values alone.

        Returns:
            Float32 or more, `[B, K, ceil(H/every), ceil(W/every)]`.
        """
        if self.model.training or self._with_grad:
            with eval_mode(self.model):
                return Pass(self.model, self.images).coarse_logits(every, stored_dtype)
        is_chosen = self.mask is not None or self._stride is not None
        if self._coarse is None and (is_chosen or not self.model.refines(self._way)):
            with self.context():
                beside = self._run.dense(self.model.strides[-1])
            return self._run.upsample(self._run.output(beside), every)
        if self._coarse is None:
            self.start_coarse(stored_dtype)
        assert self._coarse is not None
        return self._run.upsample(self._run.output(self._coarse), every)

    @torch.no_grad()
    def start_coarse(self, stored_dtype: torch.dtype | None = None) -> Pass:
        """Run the coarsest stride so that `take` can refine it.

        Args:
            stored_dtype: what early values and lattices are kept in (float16 takes half the memory); None: as
                they are.

        Raises:
            ValueError: the network is in training mode, or the mask changes the lattice.
        """
        geometry = self.model.geometry
        if self.model.training:
            raise ValueError("call model.eval() before refining: batch statistics would depend on the step")
        if not self.model.refines(self._way):
            if self.model.separates(self._way):
                what = "exchange separate makes coarse sites"
            else:
                what = f"{geometry.where_mixing} makes the lattice"
            raise ValueError(f"{what} depend on the mask: a coarse pass cannot be refined")
        self._with_grad = False
        coarsest = self.model.strides[-1]
        kept = geometry.kept_lattices | (geometry.kept_late if self._patches else set())
        with self.context():
            self._coarse = self._run.dense(coarsest, kept)
        if stored_dtype is not None:
            self._run.store(stored_dtype)
            for name, value in list(self._coarse.items()):
                if name in geometry.first:
                    del self._coarse[name]  # else it would be kept as it is, too
                elif isinstance(value, Grid) and geometry.kind[name] == "rows":
                    self._coarse[name] = Grid(value.tensor.to(stored_dtype), value.stride)
        blocks = block_shape(self.images, coarsest)
        self.mask = torch.zeros(blocks, dtype=torch.bool, device=self.images.device)
        self._values, self._sites, self._stride, self._patched = self._coarse, None, None, None
        return self

    def dense_classes(self) -> tuple[Tensor, Tensor]:
        """Classes int64 `[B, H, W]` of the dense network at the finest and at the coarsest stride, without
        gradients and in eval mode."""
        with torch.no_grad(), eval_mode(self.model):
            one = Pass(self.model, self.images)
            fine, coarse = (one.follow(Way.dense(self.model.strides[place])).classes() for place in (0, -1))
        return fine, coarse

    # -- results -------------------------------------------------------------------------------------------

    @property
    def levels(self) -> Tensor:
        """The blocks' levels int64 `[B, Hc, Wc]`, 0 for the coarsest stride.

        Raises:
            ValueError: the pass is dense.
        """
        if self.mask is None:
            raise ValueError("a dense pass has no mask")
        return block_levels(self.mask, self.model.strides).to(self.images.device)

    @property
    def memory(self) -> int | None:
        """Bytes that are kept for refining, the images apart."""
        if self._coarse is None:
            return None
        values = [
            *self._run.kept_early,
            *(v for n, v in self._coarse.items() if n not in self.model.geometry.first),
        ]
        tensors = [value.tensor if isinstance(value, Grid) else value for value in values]
        if self._sites is not None and self._values is not None:
            mixed = [value for value in self._values.values() if isinstance(value, Mixed)]
            tensors += [rows for value in mixed for rows in value.rows.values()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        return sum(storage.nbytes() for storage in storages.values())

    @property
    def output_stride(self) -> int:
        """Of a dense pass, else the finest stride, px."""
        return self._way.output_stride or self.model.strides[0]

    @property
    def grid_stride(self) -> int:
        """Stride of the logits' grid, px."""
        return self._grid().stride

    def grid_logits(self) -> Tensor:
        """Logits `[B, K, h, w]`, before the last upsampling."""
        return self._grid().tensor

    def logits(self) -> Tensor:
        """Logits `[B, K, H, W]` at the images' size, in float32 or more."""
        return self._run.upsample(self._grid())

    def upsample(self, grid_logits: Tensor, every: int = 1) -> Tensor:
        """Logits `[B, K, h, w]` of this pass's grid at every `every`-th pixel of the images."""
        return self._run.upsample(Grid(grid_logits, self._grid().stride), every)

    def classes(self) -> Tensor:
        """Classes int64 `[B, H, W]`, cheaper than through `logits`."""
        grid, geometry = self._grid(), self.model.geometry
        logits, trained = at_least_float32(grid.tensor), geometry.trained(geometry.graph.output)
        return upsample_classes(logits, self._run.size, grid.stride, trained, geometry.graph.align_corners)

    def values(self, late: bool = True) -> Values:
        """The run's values by name, among them those that losses read (`run/exits.py`).

        Args:
            late: whether a dense run's late values are needed.
        """
        if late or self._stride is None:
            return self._known(keeps=True)
        with self.context():
            return self._run.dense(self._stride, self._kept, late=False)

    def decoded(self, values: Values) -> Tensor:
        """Logits `[B, K, H, W]` that late values give of these in place of the run's own."""
        with self.context():
            return self._run.upsample(self._run.late(values))

    def macs(self) -> dict[str, int]:
        """Multiply-adds so far, for the whole batch: of `early`, `rows` and `late` values, and of the `mask`.

        Convolutions and linear layers count, places x taps x in x out as the usual figures do, padding
        included; interpolation and pooling do not.
        """
        self._grid()
        return dict(self._counts)

    # -- how it is done ------------------------------------------------------------------------------------

    def _grid(self) -> Grid:
        values = self._known(self._with_grad)
        return self._patched if self._patched is not None else self._run.output(values)

    def _known(self, keeps: bool) -> Values:
        """The run's values; of a dense run those that losses read only where it `keeps` them."""
        if self._values is None and self._stride is None:
            self.follow()
        lacks = self._stride is not None and keeps and not self._values_kept
        if self._values is None or lacks:
            assert self._stride is not None
            with self.context():
                self._values = self._run.dense(self._stride, self._kept if keeps else ())
            self._values_kept = keeps
        return self._values

    @property
    def _kept(self) -> list[str]:
        """Values that losses read beside the output."""
        geometry = self.model.geometry
        return [*geometry.exits, *geometry.entries, *geometry.vectors, *self.model.auxiliary[1:]]

    @property
    def _patches(self) -> bool:
        return (self._way.merge or self.model.merge) == "patch"

    def _with_late(self, coarse: Values | None) -> Values:
        """The coarse pass with the late values that coarse blocks keep; run anew where it has them not."""
        kept = self.model.geometry.kept_late
        if coarse is not None and kept <= coarse.keys():
            return coarse
        anew = self._run.dense(self.model.strides[-1], self.model.geometry.kept_lattices | kept)
        if coarse is None:
            return anew
        self._coarse = anew | coarse
        return self._coarse

    def _forget(self, stride: int | None = None) -> None:
        """Drop what was run, but for a coarse pass, to run dense at a stride or, next, selectively."""
        self.mask, self._sites, self._values, self._patched = None, None, None, None
        self._stride = stride

    def _levels(self, fine_blocks: Tensor) -> Tensor:
        if not isinstance(fine_blocks, Tensor):
            raise ValueError(f"fine_blocks must be a tensor, not {type(fine_blocks).__name__}")
        expected, count = block_shape(self.images, self.model.strides[-1]), len(self.model.strides) - 1
        if tuple(fine_blocks.shape) != expected or fine_blocks.dtype not in (torch.bool, torch.int64):
            raise ValueError(
                f"fine_blocks must be bool or int64 levels {list(expected)} for images "
                f"{list(self.images.shape)}, not {fine_blocks.dtype} {list(fine_blocks.shape)}"
            )
        levels = block_levels(fine_blocks, self.model.strides).to(self.images.device)
        if fine_blocks.dtype != torch.bool and bool(((levels < 0) | (levels > count)).any()):
            raise ValueError(f"levels must lie in 0..{count} for the strides {list(self.model.strides)}")
        return levels

    @contextmanager
    def context(self) -> Iterator[None]:
        """Gradients as when the pass was made; a folded network runs in its weights' dtype."""
        off = torch.autocast(self.images.device.type, enabled=False)
        with torch.set_grad_enabled(self._with_grad), off if self.model.is_folded else nullcontext():
            yield

    def _count(self, node: Node, places: int) -> None:
        tensors = {role: self._run.tensors[name] for role, name in node.tensors.items()}
        macs = OPERATORS[node.op].macs(node, tensors)
        if macs:
            self._add(self.model.geometry.part(node.name), places * macs)

    def _add(self, part: str, macs: int) -> None:
        self._counts[part] = self._counts.get(part, 0) + macs
