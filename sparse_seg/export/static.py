"""What every static form has: options, the choice of blocks, masks and outputs of one branch-free module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_seg.errors import SparseSegError
from sparse_seg.export.policies import Choice, Ranking
from sparse_seg.export.upsample import Tiles, Upsample, grid_size
from sparse_seg.masks import MaskPolicy
from sparse_seg.run.segmentor import Segmentor
from sparse_seg.run.images import MIN_SIZE

INPUTS = ("float", "uint8")


@dataclass(frozen=True)
class ExportOptions:
    """What a static network is for.

    Args:
        size: `(H, W)` of the images, px; batch: how many.
        dense: output stride of a dense network; None for a selective one.
        fine_fraction: share of fine blocks; None for the policy's own.
        given: whether the fine blocks are an input, in place of the policy.
        merge: `whole` or `patch`, see `SelectiveNetwork`; None for the model's own.
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


class StaticForm(nn.Module):
    """A network for images of one size, with every shape fixed (but see `ExportOptions.ghosts`).

    A form prepares itself with `_prepare_choice` and `_prepare_outputs`, and computes `grid_logits`.

    Args:
        model: whose form it is, folded; its tensors are the form's business.

    Attributes:
        choice: the policy; None where the network is dense, or blocks are given.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Segmentor, options: ExportOptions) -> None:
        super().__init__()
        self.options, self.strides = options, tuple(model.strides)
        self.exchange, self.merge = model.exchange, options.merge or model.merge
        self.classes = model.num_classes
        scale = 1.0 if options.input == "float" else 255.0
        mean, std = torch.tensor(options.mean) * scale, torch.tensor(options.std) * scale
        self.register_buffer("mean", mean.reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", std.reshape(1, 3, 1, 1), persistent=False)
        self.choice: Choice | None = None

    def grid_logits(self, images: Tensor, *blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits `[B, K, h, w]` before the last upsampling, and the blocks that are not coarse `[B, k]`, the
        finest first."""
        raise NotImplementedError

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

    def _prepare_choice(
        self, model: Segmentor, stride: int, trained_stride: int, align_corners: bool
    ) -> None:
        """stride: of the coarse pass's logits, px."""
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
        if not options.given:
            geometry = stride, trained_stride, align_corners
            cells = grid_size(options.size, stride)
            self.choice = Choice(policy, lambda every: Upsample(cells, options.size, *geometry, every))

    def _prepare_outputs(self, stride: int, trained_stride: int, align_corners: bool) -> None:
        """stride: of the logits, px."""
        options, cells = self.options, grid_size(self.options.size, stride)
        self.tiles = None
        if options.tiles and Tiles.fit(options.size, stride, trained_stride, align_corners):
            self.tiles = Tiles(options.batch, cells, options.size, stride, trained_stride)
        self.upsampling = Upsample(cells, options.size, stride, trained_stride, align_corners)
        self.eval().requires_grad_(False)
        with torch.no_grad():
            self(*self.example())  # makes the tables

    def _choose(
        self, images: Tensor, features: Tensor, coarse: Callable[[], Tensor], blocks: Sequence[Tensor]
    ) -> Tensor:
        """The blocks that are not coarse `[B, k]`, the finest first; images are normalised."""
        if self.choice is None:
            return torch.cat(list(blocks), 1) if len(blocks) > 1 else blocks[0]
        return self.ranking(self.choice(images, features, coarse))

    def _centred(self, images: Tensor) -> Tensor:
        """Images as given to float32 `[B, 3, H, W]` less the mean, not yet over the standard deviation."""
        if self.options.input == "uint8":
            images = images.permute(0, 3, 1, 2).float()
        return images - self.mean

    def _mask(self, fine: Tensor) -> Tensor:
        batch, total = self.options.batch, self.blocks[0] * self.blocks[1]
        mask = torch.zeros(batch, total, dtype=torch.bool, device=fine.device)
        mask = mask.scatter(1, fine, torch.ones_like(fine, dtype=torch.bool))
        return mask.reshape(batch, *self.blocks)


def check_size(options: ExportOptions) -> None:
    """Raises a SparseSegError for images that are too small."""
    if min(options.size) < MIN_SIZE:
        size = "x".join(map(str, options.size))
        raise SparseSegError(f"size {size} is too small; images must have at least {MIN_SIZE}x{MIN_SIZE} px")


def check_policy(model: Segmentor, options: ExportOptions) -> None:
    """Raises a SparseSegError for a policy that no graph can have."""
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
