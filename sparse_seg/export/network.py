"""Our own networks as one static module: images in, classes and fine blocks out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_seg.config import ModelConfig
from sparse_seg.config.keys import choices
from sparse_seg.errors import SparseSegError
from sparse_seg.export.backbone import Backbone, extra_rows, near_steps
from sparse_seg.export.geometry import LevelPlan
from sparse_seg.export.heads import static_head
from sparse_seg.export.sites import Lattice, Sites, Split
from sparse_seg.export.static import ExportOptions, StaticForm, check_policy, check_size
from sparse_seg.export.upsample import grid_size
from sparse_seg.models.heads import Head
from sparse_seg.models.patch import layers, reads_neighbours
from sparse_seg.models.resnet import STAGE_STRIDES
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way


class StaticNetwork(StaticForm):
    """Copies of a model's weights in static form.

    Args:
        model: in eval mode; stays as it is.

    Raises:
        SparseSegError: options that do not fit the model, or a part that has no static form.
    """

    def __init__(self, model: SelectiveNetwork, options: ExportOptions) -> None:
        check_options(model, options)
        model = model.for_inference()
        super().__init__(model, options)
        self.first = model.first_selective
        self.backbone = Backbone(model.backbone, self.std.flatten())
        ends = (self.strides[0], self.strides[-1]) if options.dense is None else (options.dense,)
        self.head = static_head(model.head, options.size, ends)
        last = self.head.stride or model.trained_stride, model.align_corners
        if options.dense is None:
            self._prepare_choice(model, self.head.stride or self.strides[-1], *last)
            self.plans = nn.ModuleDict()
            for stride in self.strides[-2::-1]:
                ragged = stride != self.strides[-2]
                self.plans[str(stride)] = LevelPlan(options.batch, grid_size(options.size, stride), ragged)
        self._prepare_outputs(self.head.stride or ends[0], *last)

    def grid_logits(self, images: Tensor, *blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        images = self._centred(images)
        finest, coarsest = self.strides[0], self.strides[-1]
        if self.options.dense is not None:
            x, _, outputs = self.backbone.on_lattice(self.backbone.stem(images), range(4), self.options.dense)
            return self._coarse(self.head.neck.start(x), x, outputs[0]), None
        early, _, outputs = self.backbone.on_lattice(self.backbone.stem(images), range(self.first), finest)
        lattice, steps, _ = self.backbone.on_lattice(early, range(self.first, 4), coarsest)
        started = self.head.neck.start(lattice)
        made: list[Tensor] = []

        def coarse() -> Tensor:
            if not made:  # once, for whoever asks
                made.append(self._coarse(started, lattice, outputs[0]))
            return made[0]

        chosen = self._choose(images / self.std, early.grid, coarse, blocks)
        splits = self._splits(chosen, steps)
        extras = extra_rows(steps, splits, finest)
        neck = self.head.neck.finish(started, Sites(lattice, extras, splits))
        if self.merge == "patch":
            return self.head.patch(coarse(), neck), chosen
        return self.head.whole(neck, outputs[0]), chosen

    def _coarse(self, started: Lattice, lattice: Lattice, low_level: Lattice) -> Tensor:
        return self.head.whole(self.head.neck.finish(started, Sites(lattice, {}, {})), low_level)

    def _splits(self, chosen: Tensor, steps: list) -> dict[int, Split]:
        """From block numbers `[B, k]`, for each level the cells that are split, coarsest level first."""
        batch, exchange = self.options.batch, self.exchange
        total, splits = self.blocks[0] * self.blocks[1], {}
        cells, fine = chosen, chosen[:, : self.ranking.fine] if self.ranking.middle else chosen
        if batch > 1:
            first = torch.arange(batch, device=chosen.device)[:, None] * total
            cells, fine = cells + first, fine + first
        for index, stride in enumerate(self.strides[-2::-1]):
            plan = self.plans[str(stride)]
            if index:  # the cells of fine blocks, image by image
                before = self.plans[str(2 * stride)]
                table: Tensor = before.phase_cells  # type: ignore[assignment]
                children = table.index_select(1, fine.reshape(-1))
                cells = children.reshape(4, batch, -1).permute(1, 0, 2).reshape(batch, -1)
            count = batch * (self.ranking.fine * 4 if index else self.ranking.fine + self.ranking.middle)
            near = near_steps(steps, stride) if self.options.ghosts else ()
            splits[stride] = Split(plan, cells.reshape(-1), count, exchange, near)  # type: ignore[arg-type]
        return splits


def check_options(model: SelectiveNetwork, options: ExportOptions) -> None:
    """Raises a SparseSegError, of one line, where a static network cannot be made."""
    check_size(options)
    if options.dense is not None:
        if options.dense not in STAGE_STRIDES:
            raise SparseSegError(f"dense output stride must be one of {STAGE_STRIDES}, not {options.dense}")
        return
    merges = choices(ModelConfig, "merge")
    if options.merge not in (None, *merges):
        raise SparseSegError(f"unknown merge {options.merge!r}; choose one of {', '.join(merges)}")
    if model.has_undilated:
        raise SparseSegError(
            "undilated convolutions (model.dilate_second=false) make the coarse lattice depend on the mask; "
            "such a network can be exported with --dense only"
        )
    if model.separates(Way()):
        raise SparseSegError(
            "exchange separate makes the coarse lattice depend on the mask; such a network can be exported "
            "with --dense only, or with another rule (--set model.exchange=linear)"
        )
    check_policy(model, options)
    patches = (options.merge or model.merge) == "patch"
    if patches and not _is_patchable(model.head):
        raise SparseSegError(
            "merge patch needs a head with one 3x3 convolution behind densify; choose merge whole"
        )


def _is_patchable(head: Head) -> bool:
    return head.decodes_cells and any(map(reads_neighbours, layers(head.refine)))
