"""A pass over images: backbone, head and upsampling, each stage at most once, whoever asks.

A mask policy is given the pass and asks it for what it needs. Where it asks for coarse logits, the pass keeps
what its layers read and then refines: it runs the sites that the mask adds, and only those (P4 of
docs/method.md). With several steps, earlier sites keep their values, so new sites next to older ones may
differ from those of a pass in one step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from sparse_seg.masks import MaskPolicy, block_levels
from sparse_seg.models.heads import LOW_LEVEL_STRIDE
from sparse_seg.models.layouts import check_images, selective_layouts, warn_of_bytes
from sparse_seg.models.network import Network, eval_mode
from sparse_seg.models.stages import Stages
from sparse_seg.models.upsample import at_least_float32, upsample_classes, upsample_logits
from sparse_seg.models.way import Way
from sparse_seg.sparse import Memory, SiteLayout, Step, densify, rows_to_grid


class Pass:
    """One pass of a network over images; nothing is computed before it is asked for.

    `follow` or `take` say how to run; then `logits`, `classes` and `rows` are there, `mask` (None when dense)
    and `macs`. Calling them again runs on from what is known.

    Args:
        model: whose pass it is.
        images: normalised, float `[B, 3, H, W]`, any size from 32x32 up.
        labels: int64 `[B, H, W]`, for policies that read them.

    Raises:
        ValueError: images of a wrong shape or dtype.
    """

    def __init__(self, model: Network, images: Tensor, labels: Tensor | None = None) -> None:
        check_images(images)
        warn_of_bytes(images)
        self.model, self.images, self.labels = model, images, labels
        self.mask: Tensor | None = None  # bool or int64 `[B, Hc, Wc]`
        self.memory: Memory | None = None  # of a coarse pass that can be refined
        self._with_grad = torch.is_grad_enabled()
        self._way = Way()
        self._stages = Stages(model, images)
        self._steps: list[Step] = []  # of all stages, as asked for
        self._neck: Tensor | None = None
        self._grid: Tensor | None = None
        self._coarse: Tensor | None = None  # logits of the coarse pass, for merge `patch`
        self._counts: list[tuple[str, Callable[[], int]]] = []  # of each part that ran, made when asked for

    # -- how to run ----------------------------------------------------------------------------------------

    def follow(self, way: Way | None = None, policy: MaskPolicy | None = None) -> Pass:
        """Run this way; a policy chooses the mask now. Returns the pass itself.

        Args:
            policy: overrides the way's.
        """
        self._way = way or Way()
        if self._way.output_stride is not None:
            self.mask = None
            self._go(self._stages.dense(self._way.output_stride))
            return self
        policy = policy or self.model.policy_for(self._way)
        fine_blocks = policy(self)
        finest = self._stages.dense_step(self.model.strides[0]).layout
        self._count("mask", lambda: policy.macs(finest.size, finest.stride, finest.batch))
        return self.take(fine_blocks, self._way)

    def take(self, fine_blocks: Tensor, way: Way | None = None) -> Pass:
        """Run under this mask, see `SelectiveSegmentor.forward`. After a coarse pass, refine it.

        Args:
            way: gives exchange rule and engine; its policy is not asked.

        Raises:
            ValueError: a wrong shape or dtype, a block that would become coarser than it is, or merge `patch`
                where no coarse pass can be refined.
        """
        self._way, fine_blocks = way or Way(), fine_blocks.to(self.images.device)
        if self._patches:
            self._check_refines()
        layouts = selective_layouts(self.images, fine_blocks, self.model.strides)
        if self._patches and self.memory is None and not (self._with_grad or self.model.training):
            self.start_coarse()  # its lattice serves the fine sites, too
        if self.memory is not None:
            self._refine(layouts, fine_blocks)
        elif self.model.is_folded and layouts[-1].is_full:
            self._go(self._stages.dense(self.model.strides[0]))  # all fine: dense gathers nothing
        else:
            late = self._late_steps(layouts, [None] * len(layouts))
            self._go([*self._stages.early(), *late])
        self.mask = fine_blocks
        return self

    def fork(self) -> Pass:
        """An independent copy of the pass from here on."""
        other = copy.copy(self)
        other.memory = None if self.memory is None else self.memory.copy()
        other._stages = copy.copy(self._stages)
        other._counts = list(self._counts)
        return other

    # -- what a policy may ask for -------------------------------------------------------------------------

    def features(self) -> Tensor:
        """Output `[B, C, h, w]` of the last stage before the mask, at the finest stride."""
        early = self._stages.early()
        if self._stages.done[: len(early)] != early:
            self._run(early)
        layout = early[-1].layout
        return rows_to_grid(self._stages.rows[len(early) - 1], layout.batch, layout.size)

    @torch.no_grad()
    def coarse_logits(self, every: int = 1, stored_dtype: torch.dtype | None = None) -> Tensor:
        """Logits of the dense network at the coarsest stride, at every `every`-th pixel.

        In eval mode this pass then refines what was run here. With exchange `separate`, or where gradients
        are needed, it cannot: the coarse pass then shares only the stages before the mask. In training mode a
        pass of its own is run, in eval mode.

        Args:
            stored_dtype: what activations are kept in (float16 takes half the memory); None: as they are.

        Returns:
            Float32 or more, `[B, K, ceil(H/every), ceil(W/every)]`.

        Raises:
            ValueError: the network has undilated convolutions, whose coarse pass depends on the mask.
        """
        if self.model.training:
            with eval_mode(self.model):
                return Pass(self.model, self.images).coarse_logits(every)
        if self.memory is None and (self.model.separates(self._way) or self._needs_grad):
            if not self.model.separates(self._way):
                self._check_refines()
            self.features()
            run = self._beside(Way.dense(self.model.strides[-1]))
            logits, self._counts = run.grid_logits(), run._counts
            return run.upsample(logits.float(), every)
        if self.memory is None:
            self.start_coarse(stored_dtype)
        return self.upsample(self.grid_logits().float(), every)

    @torch.no_grad()
    def start_coarse(self, stored_dtype: torch.dtype | None = None) -> Pass:
        """Run the coarsest stride so that `take` can refine it.

        Raises:
            ValueError: the network is in training mode, or the mask changes the coarse sites.
        """
        if self.model.training:
            raise ValueError("call model.eval() before refining: batch statistics would depend on the step")
        self._check_refines()
        self.memory, self._with_grad = Memory(stored_dtype), False
        layouts = [step.layout for step in self._stages.dense(self.model.strides[-1])]
        self._go([*self._stages.early(), *self._late_steps(layouts, [None] * len(layouts))])
        coarsest = layouts[-1]
        self.mask = torch.zeros(coarsest.batch, *coarsest.size, dtype=torch.bool, device=coarsest.device)
        self._coarse = self.grid_logits()
        return self

    def dense_classes(self) -> tuple[Tensor, Tensor]:
        """Classes int64 `[B, H, W]` of the dense network at the finest and at the coarsest stride, without
        gradients and in eval mode."""
        if self.model.training:
            with torch.no_grad(), eval_mode(self.model):
                return Pass(self.model, self.images).dense_classes()
        fine, coarse = (self._dense_classes(self.model.strides[i]) for i in (0, -1))
        return fine, coarse

    @torch.no_grad()
    def _dense_classes(self, stride: int) -> Tensor:
        return self._beside(Way.dense(stride)).classes()

    def _beside(self, way: Way) -> Pass:
        """A pass of its own, without gradients, that shares the stages run so far."""
        run = self.fork()
        run.memory, run._with_grad = None, False  # what it kept belongs to the pass
        return run.follow(way)

    # -- results -------------------------------------------------------------------------------------------

    @property
    def layouts(self) -> list[SiteLayout]:
        """The sites of the four stages, as they are asked for."""
        return [step.layout for step in self._steps]

    @property
    def levels(self) -> Tensor:
        """The blocks' levels int64 `[B, Hc, Wc]`, 0 for the coarsest stride.

        Raises:
            ValueError: the pass is dense.
        """
        if self.mask is None:
            raise ValueError("a dense pass has no mask")
        return block_levels(self.mask, self.model.strides)

    def stage_rows(self) -> list[Tensor]:
        """Rows `[num_sites, C]` of each stage, of a pass without a coarse one before it."""
        self._run(self._steps)
        return self._stages.rows

    def rows(self) -> Tensor:
        """The neck's rows `[N, C]` of all sites of `layouts[-1]`, before densify."""
        if self._neck is None:
            self._run(self._steps)
            head, rows, step = self.model.head, self._stages.rows[-1], self._steps[-1]
            with self._context():
                self._neck = head.neck(rows, step)
            self._count("neck", lambda: head.neck_macs(step))
        return self._neck

    def grid_logits(self) -> Tensor:
        """The head's logits `[B, K, h, w]`, before the last upsampling."""
        if self._grid is None:
            self._grid = self._merged(self.rows(), self._steps[-1])
        return self._grid

    def logits(self) -> Tensor:
        """Logits `[B, K, H, W]` at the images' size, in float32 or more."""
        return self.upsample(self.grid_logits())

    def upsample(self, grid_logits: Tensor, every: int = 1) -> Tensor:
        """The head's logits `[B, K, h, w]` at every `every`-th pixel of the images, in float32 or more."""
        return self._upsample(grid_logits, *self._upsampling(), every)

    def classes(self) -> Tensor:
        """Classes int64 `[B, H, W]`, cheaper than through `logits`."""
        size = (self.images.shape[2], self.images.shape[3])
        logits = at_least_float32(self.grid_logits())
        return upsample_classes(logits, size, *self._upsampling(), self.model.align_corners)

    def _merged(self, rows: Tensor, step: Step) -> Tensor:
        """The neck's rows of a step to the head's logits."""
        head, layout, low_level = self.model.head, step.layout, self._stages.done[0].layout
        patches = self._patches and bool(layout.splits)
        coarse = self._coarse_grid() if patches else None
        with self._context():
            if coarse is not None:
                grid = head.patch(coarse, rows, layout, self._stages.low_level())
            else:
                grid = head.decode(densify(rows, layout), layout.stride, self._stages.low_level())
        decoder = head.patch_macs if patches else head.decode_macs
        self._count("head", lambda: decoder(layout, low_level))
        return grid

    def _coarse_grid(self) -> Tensor:
        """The head's logits of the coarse pass, on its lattice.

        In training they are made of the neck's rows of all sites: a second run on the lattice alone would
        pull its running statistics towards coarse.
        """
        if self._coarse is None:
            head, layout = self.model.head, self._stages.dense_step(self.model.strides[-1]).layout
            step = Step(layout, exchange=self._way.exchange, engine=self._way.engine)
            if self.model.training:
                neck = self.rows()[: layout.num_sites]
            else:
                with self._context():
                    neck = head.neck(self._stages.rows[-1][: layout.num_sites], step)
                self._count("neck", lambda: head.neck_macs(step))
            self._coarse = self._merged(neck, step)
        return self._coarse

    @property
    def _needs_grad(self) -> bool:
        tensors = (self.images, *self.model.parameters())
        return self._with_grad and any(tensor.requires_grad for tensor in tensors)

    @property
    def _patches(self) -> bool:
        return (self._way.merge or self.model.merge) == "patch"

    def _check_refines(self) -> None:
        if not self.model.refines(self._way):
            what = (
                "exchange separate makes"
                if self.model.separates(self._way)
                else "undilated convolutions make"
            )
            raise ValueError(f"{what} coarse sites depend on the mask: a coarse pass cannot be refined")

    def lattice_logits(self) -> Tensor:
        """Logits `[B, K, H, W]` of the coarse lattice alone: what the head says if no block is fine."""
        finest, coarse = (self._stages.dense_step(self.model.strides[i]).layout for i in (0, -1))
        no_blocks = torch.zeros(coarse.batch, *coarse.size, dtype=torch.bool, device=coarse.device)
        all_coarse = selective_layouts(self.images, no_blocks, self.model.strides)[-1]
        rows, places = self.rows(), self._steps[-1].layout.rows_at(coarse)
        lattice = rows if places is None else rows.index_select(0, places)
        grid = self.model.head.decode(densify(lattice, all_coarse), finest.stride, self._stages.low_level())
        return self._upsample(grid, *self._upsampling(finest.stride))

    def auxiliary_logits(self) -> Tensor | None:
        """Logits `[B, K, H, W]` of the auxiliary head; None without one or outside training."""
        model = self.model
        if model.auxiliary is None or not model.training:
            return None
        index = len(model.backbone.stages) - 2
        layout = self._steps[index].layout
        logits = model.auxiliary(self.stage_rows()[index], layout)
        return self._upsample(logits, layout.stride, model.trained_stride)

    def macs(self) -> dict[str, int]:
        """Multiply-adds so far, by part, for the whole batch: those of `grid_logits`, which it asks for.

        Parts are `stem`, the stages, `neck` (what the head runs on rows), `head` (after densify) and `mask`.
        Convolutions and linear layers count, sites x taps x in x out as the usual figures do, padding
        included; interpolation and pooling do not.
        """
        self.grid_logits()
        macs: dict[str, int] = {}
        for part, count in self._counts:
            macs[part] = macs.get(part, 0) + count()
        return macs

    # -- how it is done ------------------------------------------------------------------------------------

    def _go(self, steps: list[Step]) -> None:
        self._steps, self._neck, self._grid = steps, None, None

    def _refine(self, layouts: Sequence[SiteLayout], fine_blocks: Tensor) -> None:
        assert self.memory is not None
        old, new = self.levels, block_levels(fine_blocks, self.model.strides)
        if bool((new < old).any()):
            raise ValueError("a step can only refine: some block has a lower level than before")
        self.rows()  # what is kept must be there
        self.memory.start_step()
        before = [step.layout for step in self._steps]
        self._go([*self._stages.early(), *self._late_steps(layouts, before)])

    def _run(self, steps: Sequence[Step]) -> None:
        with self._context():
            self._counts += self._stages.run(steps)

    def _late_steps(self, layouts: Sequence[SiteLayout], before: Sequence[SiteLayout | None]) -> list[Step]:
        return self._stages.late(layouts, before, self._way, self.memory)

    @contextmanager
    def _context(self) -> Iterator[None]:
        """Gradients as when the pass was made. A folded network runs in its weights' dtype, whatever autocast
        says."""
        off = torch.autocast(self.images.device.type, enabled=False)
        with torch.set_grad_enabled(self._with_grad), off if self.model.is_folded else nullcontext():
            yield

    def _count(self, part: str, macs: Callable[[], int]) -> None:
        self._counts.append((part, macs))

    def _upsampling(self, stride: int | None = None) -> tuple[int, int]:
        """The stride of the head's logits, and that whose offset it was trained with."""
        if self.model.head.reads_low_level:
            return LOW_LEVEL_STRIDE, LOW_LEVEL_STRIDE
        return stride or self._steps[-1].layout.stride, self.model.trained_stride

    def _upsample(self, logits: Tensor, stride: int, trained: int, every: int = 1) -> Tensor:
        size = (self.images.shape[2], self.images.shape[3])
        return upsample_logits(
            at_least_float32(logits), size, stride, trained, self.model.align_corners, every
        )
