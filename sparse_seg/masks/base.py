"""What every mask policy shares: score blocks, rank them once, then cut by thresholds or budgets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.config import MaskConfig
from sparse_seg.config.keys import choices
from sparse_seg.errors import choose_one, shown

BLOCK = 16  # pixels of a block's side: a block is one cell of the coarsest grid, by default that of stride 16


class PolicyInput(Protocol):
    """What a policy may ask: a pass over images (`run/passes.py`), which computes what is asked for.

    images: normalised, `[B, 3, H, W]`. labels: int64 `[B, H, W]`, or None.
    """

    images: Tensor
    labels: Tensor | None

    def features(self) -> Tensor:
        """Output `[B, C, h, w]` of the last stage before the mask."""

    def coarse_logits(self, every: int = 1, stored_dtype: torch.dtype | None = None) -> Tensor:
        """Logits of a coarse pass at every `every`-th pixel, `[B, K, ceil(H/every), ceil(W/every)]`."""

    def dense_classes(self) -> tuple[Tensor, Tensor]:
        """Classes `[B, H, W]` of the dense network at the finest and at the coarsest stride."""


class MaskPolicy(nn.Module, ABC):
    """Chooses each block's level for a run: a subclass gives `scores`, this class cuts them.

    A block is one cell of the coarsest grid. At level 0 it keeps that grid's one site; each level more halves
    its stride. With two strides the result is a bool mask of fine blocks; with three, where `middle_fraction`
    or `middle_threshold` is given, it is int64 levels 0 (coarsest stride), 1, 2 (finest).

    Args:
        fine_fraction: share of blocks in 0..1; exactly `round(fine_fraction * blocks)` per image become fine,
            those of the highest scores (ties: in raster order).
        threshold: blocks with a score above it become fine. Give one of the two.
        middle_fraction: with three strides, the share of blocks, next in rank, that get the middle one.
        middle_threshold: with three strides, those with a score above it that are not fine.
        block: pixels of a block's side, the coarsest stride.
        blur: smooth the scores over neighbouring blocks before they are cut, see `blur_scores`.

    Raises:
        ValueError: both or neither cut given, cuts of two kinds, or a fraction outside 0..1.
    """

    OPTIONS: ClassVar[dict[str, str]] = {}  # key of the mask's config: argument of the constructor
    needs_net: ClassVar[bool] = False  # whether it is trained: `build_policy` needs its net
    ranks_refinement: ClassVar[bool] = False  # whether `refine` ranks blocks by it: it reads the coarse pass
    reads_image_alone: ClassVar[bool] = True  # its scores follow from the image: a graph can make them
    is_bound: ClassVar[bool] = False  # reads labels or dense classes; what that costs is not counted

    def __init__(
        self,
        fine_fraction: float | None = None,
        threshold: float | None = None,
        middle_fraction: float | None = None,
        middle_threshold: float | None = None,
        *,
        block: int = BLOCK,
        blur: bool = False,
    ) -> None:
        super().__init__()
        if (fine_fraction is None) == (threshold is None):
            raise ValueError("give a mask policy either fine_fraction or threshold")
        fraction, middle = fine_fraction or 0, middle_fraction or 0
        try:
            is_share = 0 <= fraction <= 1
        except TypeError:
            is_share = False
        if not is_share:
            raise ValueError(f"fine_fraction must lie in 0..1, not {shown(fine_fraction)}")
        if not (middle >= 0 and fraction + middle <= 1 + 1e-9):
            raise ValueError(
                f"fine_fraction {fraction} and middle_fraction {middle_fraction} must add up to 1 at most"
            )
        if (middle_fraction if threshold is not None else middle_threshold) is not None:
            raise ValueError("cut both levels alike: fractions with fractions, thresholds with thresholds")
        if threshold is not None and middle_threshold is not None and middle_threshold > threshold:
            raise ValueError(f"middle_threshold {middle_threshold} must not exceed threshold {threshold}")
        self.fine_fraction, self.threshold = fine_fraction, threshold
        self.middle_fraction, self.middle_threshold = middle_fraction, middle_threshold
        self.block, self.blur = block, blur

    @classmethod
    def make_net(
        cls, features: int, factor: int, classes: int, learned_net: Callable[..., nn.Module]
    ) -> nn.Module | None:
        """The net of a policy that needs one, with fresh weights.

        Args:
            features: channels of the last stage before the mask; factor: its cells along a block's side.
            classes: K.
            learned_net: makes the net of a policy that reads features, of these and the factor.
        """
        return None

    @property
    def name(self) -> str:
        """As in `model.mask.policy`."""
        return type(self).__name__.removesuffix("Policy").lower()

    @abstractmethod
    def scores(self, run: PolicyInput) -> Tensor:
        """Scores `[B, ceil(H/block), ceil(W/block)]` of the blocks of a run's images."""

    @torch.no_grad()
    def forward(self, run: PolicyInput) -> Tensor:
        """The fine blocks, bool `[B, ceil(H/block), ceil(W/block)]`, or with three strides int64 levels."""
        return self.cut(self.scores(run))

    def remember(self, run: Any) -> None:
        """Take note of an image's pass (`run/passes.py`) for the next image, as a policy for videos does;
        None: a new sequence begins."""

    def macs(self, size: tuple[int, int], stride: int, batch: int) -> int:
        """Multiply-adds of the policy's own convolutions: none but a net's.

        size: of features' grid, at `stride` px.
        """
        return 0

    def fine_count(self, blocks: int) -> int | None:
        """How many of an image's blocks become fine; None where that follows from the scores, or a subclass
        cuts them itself."""
        own = (type(self).forward, type(self).cut) == (MaskPolicy.forward, MaskPolicy.cut)
        return round(self.fine_fraction * blocks) if own and self.fine_fraction is not None else None

    def cut(self, scores: Tensor) -> Tensor:
        """Scores `[B, h, w]` to fine blocks or levels."""
        scores = blur_scores(scores) if self.blur else scores
        if self.fine_fraction is not None:
            return top_blocks(scores, self.fine_fraction, self.middle_fraction)
        assert self.threshold is not None
        fine = self.reaches(scores, self.threshold)
        if self.middle_threshold is None:
            return fine
        return fine.long() + self.reaches(scores, self.middle_threshold)

    def reaches(self, scores: Tensor, threshold: float) -> Tensor:
        """Which scores a threshold lets through: those above it."""
        return scores > threshold

    def extra_repr(self) -> str:
        names = ("fine_fraction", "middle_fraction", "threshold", "middle_threshold")
        text = ", ".join(f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None)
        return text + (", blur" if self.blur else "")


def one_of(what: str, key: str, value: str) -> str:
    """A value of a key of `model.mask`. Raises a ValueError with the nearest valid one."""
    valid = choices(MaskConfig, key)
    if value not in valid:
        raise ValueError(f"unknown {what} {choose_one(value, valid)}")
    return value


def blur_scores(scores: Tensor) -> Tensor:
    """`[B, h, w]` smoothed by 1 2 1 along both axes, borders replicated.

    Fine blocks then lie together. A fine block next to coarse ones reads interpolated values from them, so
    one that stands alone gains less than its score says.
    """
    padded = F.pad(scores.float()[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16


def top_blocks(scores: Tensor, fine_fraction: float, middle_fraction: float | None = None) -> Tensor:
    """The `round(fine_fraction * h * w)` highest scores of each image `[B, h, w]`, as a bool mask.

    With `middle_fraction`, int64 levels: 2 for those, 1 for the next of the ranking up to the share of both.
    """
    flat = scores.flatten(1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places).view_as(scores)
    fine = ranks < round(fine_fraction * flat.shape[1])
    if middle_fraction is None:
        return fine
    return fine.long() + (ranks < round((fine_fraction + middle_fraction) * flat.shape[1]))


def block_levels(fine_blocks: Tensor, strides: Sequence[int]) -> Tensor:
    """A mask, bool or int64, as int64 levels: 0 for the coarsest of the strides."""
    return fine_blocks.long() * (len(strides) - 1 if fine_blocks.dtype == torch.bool else 1)


def block_shape(images: Tensor, block: int = BLOCK) -> tuple[int, int, int]:
    """`(B, ceil(H/block), ceil(W/block))` of images `[B, C, H, W]`."""
    # not -(-length // block), which the ONNX exporter truncates
    height, width = ((length + block - 1) // block for length in images.shape[2:])
    return images.shape[0], height, width
