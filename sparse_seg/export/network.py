"""The whole network as one static module: images in, classes and fine blocks out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_seg.config import ModelConfig
from sparse_seg.config.keys import choices
from sparse_seg.errors import SparseSegError
from sparse_seg.export.backbone import Backbone, extra_rows, near_steps
from sparse_seg.export.geometry import LevelPlan
from sparse_seg.export.heads import static_head
from sparse_seg.export.policies import Choice, Ranking
from sparse_seg.export.sites import Lattice, Sites, Split
from sparse_seg.export.upsample import Tiles, Upsample, grid_size
from sparse_seg.masks import MaskPolicy
from sparse_seg.models.heads import Head
from sparse_seg.models.layouts import MIN_SIZE
from sparse_seg.models.patch import layers, reads_neighbours
from sparse_seg.models.resnet import STAGE_STRIDES
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.models.way import Way

INPUTS = ("float", "uint8")


@dataclass(frozen=True)
class ExportOptions:
    """What a static network is for.

    Args:
        size: `(H, W)` of the images, px; batch: how many.
        dense: output stride of a dense network; None for a selective one.
        fine_fraction: share of fine blocks; None for the policy's own.
        given: whether the fine blocks are an input, in place of the policy.
        merge: `whole` or `patch`, see `SelectiveSegmentor`; None for the model's own.
        input: `float`, `[B, 3, H, W]` in 0..1; or `uint8`, `[B, H, W, 3]`.
        mean, std: of the normalisation, which the network does itself.
        logits: whether the logits `[B, K, H, W]` are an output, too.
        ghosts: whether ghosts are made for the needed cells only; their number, the one shape that depends
            on the data, makes it faster on CPUs.
        tiles: whether pixels are interpolated where classes meet only, which makes shapes depend on the
            data, too.
        policy: chooses the fine blocks; None for the model's own.
    """

    size: tuple[int, int]
    batch: int = 1
    dense: int | None = None
    fine_fraction: float | None = None
    given: bool = False
    merge: str | None = None
    input: str = "float"
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    logits: bool = False
    ghosts: bool = True
    tiles: bool = True
    policy: MaskPolicy | None = None


class StaticNetwork(nn.Module):
    """Copies of a model's weights in static form; every shape is fixed (but see `ExportOptions.ghosts`).

    Args:
        model: in eval mode; stays as it is.

    Raises:
        SparseSegError: options that do not fit the model, or a part that has no static form.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: SelectiveSegmentor, options: ExportOptions) -> None:
        super().__init__()
        check_options(model, options)
        model = model.for_inference()
        self.options, self.strides = options, tuple(model.strides)
        self.exchange, self.merge = model.exchange, options.merge or model.merge
        self.first = model.first_selective
        self.classes = model.head.num_classes
        scale = 1.0 if options.input == "float" else 255.0
        mean, std = torch.tensor(options.mean) * scale, torch.tensor(options.std) * scale
        self.register_buffer("mean", mean.reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.reshape(1, 3, 1, 1), persistent=False)
        self.backbone = Backbone(model.backbone, std)
        ends = (self.strides[0], self.strides[-1]) if options.dense is None else (options.dense,)
        self.head = static_head(model.head, options.size, ends)
        self.trained_stride, self.align_corners = (
            self.head.stride or model.trained_stride,
            model.align_corners,
        )
        self.choice: Choice | None = None
        if options.dense is None:
            self._prepare_levels(model)
        stride = self.head.stride or ends[0]
        cells = grid_size(options.size, stride)
        self.tiles = None
        if options.tiles and Tiles.fit(options.size, self.trained_stride, self.align_corners):
            self.tiles = Tiles(options.batch, cells, options.size, stride, self.trained_stride)
        self.upsampling = Upsample(cells, options.size, stride, self.trained_stride, self.align_corners)
        self.eval().requires_grad_(False)
        with torch.no_grad():
            self(*self.example())  # makes the tables

    def example(self) -> tuple[Tensor, ...]:
        """Inputs of the right shapes."""
        batch, (height, width) = self.options.batch, self.options.size
        images = torch.zeros(batch, 3, height, width)
        if self.options.input == "uint8":
            images = torch.zeros(batch, height, width, 3, dtype=torch.uint8)
        if self.options.dense is not None or not self.options.given:
            return (images,)
        lists = (self.ranking.fine, self.ranking.middle) if len(self.strides) == 3 else (self.ranking.fine,)
        blocks = torch.arange(sum(lists)).repeat(batch, 1)
        return (images, *blocks.split(lists, 1))

    def _prepare_levels(self, model: SelectiveSegmentor) -> None:
        options, coarsest = self.options, self.strides[-1]
        self.blocks = grid_size(options.size, coarsest)
        total, policy = self.blocks[0] * self.blocks[1], options.policy or model.policy
        fine = policy.fine_fraction if options.fine_fraction is None else options.fine_fraction
        assert fine is not None
        middle = min(policy.middle_fraction or 0, 1 - fine) if len(self.strides) == 3 else 0
        count = round(fine * total)
        self.ranking = Ranking(count, round((fine + middle) * total) - count, policy.blur)
        if count == 0:
            raise SparseSegError(
                f"a fine fraction of {fine:g} gives none of {total} blocks; choose a larger one, or --dense "
                f"{coarsest}"
            )
        self.plans = nn.ModuleDict()
        for stride in self.strides[-2::-1]:
            ragged = stride != self.strides[-2]
            self.plans[str(stride)] = LevelPlan(options.batch, grid_size(options.size, stride), ragged)
        if not options.given:
            stride = self.head.stride or coarsest
            geometry = stride, self.trained_stride, self.align_corners
            cells = grid_size(options.size, stride)
            self.choice = Choice(policy, lambda every: Upsample(cells, options.size, *geometry, every))

    def forward(self, images: Tensor, *blocks: Tensor) -> tuple[Tensor, ...]:
        """Images, and with `given` block numbers, to classes uint8 `[B, H, W]`, if selective fine blocks bool
        `[B, Hc, Wc]`, and if asked for logits `[B, K, H, W]`.

        Args:
            blocks: int64 `[B, k]`, those at the finest stride; with three strides a second list, those at the
                middle one.
        """
        logits, chosen = self.grid_logits(images, *blocks)
        every = self.upsampling(logits) if self.options.logits or self.tiles is None else logits
        if self.tiles is not None:
            outputs = [self.tiles(logits)]
        else:
            outputs = [every.argmax(1).to(torch.uint8)]
        if chosen is not None:
            outputs.append(self._mask(chosen[:, : self.ranking.fine]))
        if self.options.logits:
            outputs.append(every)
        return tuple(outputs)

    def grid_logits(self, images: Tensor, *blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """The head's logits `[B, K, h, w]`, and the blocks that are not coarse `[B, k]`, the finest first."""
        if self.options.input == "uint8":
            images = images.permute(0, 3, 1, 2).float()
        images = images - self.mean
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

        chosen = self._choose(images, early, coarse, blocks)
        splits = self._splits(chosen, steps)
        extras = extra_rows(steps, splits, finest)
        neck = self.head.neck.finish(started, Sites(lattice, extras, splits))
        if self.merge == "patch":
            return self.head.patch(coarse(), neck), chosen
        return self.head.whole(neck, outputs[0]), chosen

    def _coarse(self, started: Lattice, lattice: Lattice, low_level: Lattice) -> Tensor:
        return self.head.whole(self.head.neck.finish(started, Sites(lattice, {}, {})), low_level)

    def _choose(
        self, images: Tensor, features: Lattice, coarse: Callable[[], Tensor], blocks: Sequence[Tensor]
    ) -> Tensor:
        if self.choice is None:
            return torch.cat(list(blocks), 1) if len(blocks) > 1 else blocks[0]
        return self.ranking(self.choice(images / self.std, features.grid, coarse))

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

    def _mask(self, fine: Tensor) -> Tensor:
        batch, total = self.options.batch, self.blocks[0] * self.blocks[1]
        mask = torch.zeros(batch, total, dtype=torch.bool, device=fine.device)
        mask = mask.scatter(1, fine, torch.ones_like(fine, dtype=torch.bool))
        return mask.reshape(batch, *self.blocks)


def check_options(model: SelectiveSegmentor, options: ExportOptions) -> None:
    """Raises a SparseSegError, of one line, where a static network cannot be made."""
    if min(options.size) < MIN_SIZE:
        size = "x".join(map(str, options.size))
        raise SparseSegError(f"size {size} is too small; images must have at least {MIN_SIZE}x{MIN_SIZE} px")
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
    policy = options.policy or model.policy
    if policy.is_bound and not options.given:
        raise SparseSegError(
            f"mask policy {policy.name} reads what no mask can know, labels or the dense network, and "
            "cannot be exported; use --policy given, with the blocks as an input, or another policy"
        )
    if policy.fine_fraction is None and options.fine_fraction is None:
        raise SparseSegError(
            "a threshold gives another number of blocks for each image; export with --fine-fraction F"
        )
    patches = (options.merge or model.merge) == "patch"
    if patches and not _is_patchable(model.head):
        raise SparseSegError(
            "merge patch needs a head with one 3x3 convolution behind densify; choose merge whole"
        )


def _is_patchable(head: Head) -> bool:
    return head.decodes_cells and any(map(reads_neighbours, layers(head.refine)))
