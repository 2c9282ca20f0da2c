"""How to look at an image: whole or through overlapping windows, once or also mirrored and scaled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg.data.dataset import SMALLEST_SIDE
from sparse_seg.export.segmentor import Elsewhere
from sparse_seg.masks import MaskPolicy, block_shape
from sparse_seg.ops.upsample import upsample_classes
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way

ALIGNMENT = 32  # px; windows start on sites of every stride
LEAST_WINDOW = 256  # px
LEAST_SIDE = 2 * ALIGNMENT  # px of the image in a window, for two to overlap
STRIP = 256  # rows


class Prediction(NamedTuple):
    """Classes int64 `[B, H, W]` and the blocks' levels int64 `[B, Hc, Wc]`, None when dense."""

    classes: Tensor
    levels: Tensor | None


@dataclass(frozen=True)
class Views:
    """By default the whole image, once.

    Args:
        window: side in px, at the largest scale, of square windows that cover larger images, so that memory
            is bounded; None: the whole image at once. Between two windows the seam lies in the middle of
            their overlap: a network that reads no further than half of it computes what it does for the
            whole image (if its sides are multiples of the stride). ASPP's pooling and the budget of a mask
            policy are of each window.
        overlap: of neighbouring windows, px.
        flip: also look at the mirror image.
        scales: factors on the image's sides to look at. Class probabilities are averaged over all looks.
            None: 1, or what `at` sets.

    Raises:
        ValueError: windows too small, also for the largest scale, a scale that is not positive, or a negative
            overlap.
    """

    window: int | None = None
    overlap: int = 256
    flip: bool = False
    scales: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < LEAST_WINDOW:
            raise ValueError(f"windows of {self.window} px are too small; use {LEAST_WINDOW} or more")
        if not self.factors or not all(0 < factor < math.inf for factor in self.factors):
            raise ValueError(f"scales must be positive, not {list(self.factors)}")
        largest = max(self.factors)
        if self.window is not None and self.window / largest < LEAST_SIDE:
            raise ValueError(
                f"windows of {self.window} px show {int(self.window / largest)} px of an image at a scale of "
                f"{largest:g}; use {math.ceil(LEAST_SIDE * largest)} or more"
            )
        if self.overlap < 0:
            raise ValueError(f"overlap must not be negative, not {self.overlap}")

    @property
    def factors(self) -> tuple[float, ...]:
        """`scales`, or the image's own size."""
        return (1.0,) if self.scales is None else self.scales

    @property
    def is_one_look(self) -> bool:
        return not self.flip and len(self.factors) == 1

    @property
    def is_single(self) -> bool:
        """Whether the one look is at the image as it is."""
        return self.is_one_look and self.factors == (1.0,)

    def at(self, scale: float) -> Views:
        """These views at a scale, where none is asked for."""
        return self if self.scales is not None else replace(self, scales=(scale,))

    def count_windows(self, height: int, width: int) -> int:
        """How many windows cover an image; 1: it is seen whole."""
        return len(list(_spans(height, self))) * len(list(_spans(width, self)))


ONCE = Views()


@torch.inference_mode()
def predict(
    model: SelectiveNetwork | Elsewhere,
    images: Tensor,
    labels: Tensor | None = None,
    way: Way | None = None,
    policy: MaskPolicy | None = None,
    views: Views = ONCE,
) -> Prediction:
    """Classes and blocks of normalised images `[B, 3, H, W]`.

    Args:
        labels: int64 `[B, H, W]`, for policies that read them.
        policy: overrides the way's; it remembers images that are seen whole and once, at any scale.

    Raises:
        ValueError: images of a wrong shape or dtype, or too small at one of the scales.
    """
    way, block = way or Way(), model.strides[-1]
    height, width = images.shape[2:]
    rows, columns = (list(_spans(length, views)) for length in (height, width))
    if len(rows) == len(columns) == 1:
        found, run = _look(model, images, labels, way, policy, views)
        if policy is not None and views.is_one_look:
            policy.remember(run)
        return found
    classes = images.new_empty(images.shape[0], height, width, dtype=torch.int64)
    levels = None if way.is_dense else classes.new_empty(block_shape(images, block))
    for row, column in itertools.product(rows, columns):
        window = (..., slice(row.start, row.stop), slice(column.start, column.stop))
        truth = None if labels is None else labels[window]
        part, _ = _look(model, images[window], truth, way, policy, views)
        for whole, own, cell in ((classes, part.classes, 1), (levels, part.levels, block)):
            if whole is not None and own is not None:
                (top, own_top), (left, own_left) = row.cells(cell), column.cells(cell)
                whole[:, top, left] = own[:, own_top, own_left]
    return Prediction(classes, levels)


class _Span(NamedTuple):
    """Where a window lies along an axis, and the part of it that counts, px."""

    start: int
    stop: int
    first: int
    last: int

    def cells(self, side: int) -> tuple[slice, slice]:
        """The cells of `side` px that count: in a map of the whole, and in one of the window."""
        first, last, start = self.first // side, -(-self.last // side), self.start // side
        return slice(first, last), slice(first - start, last - start)


def _spans(length: int, views: Views) -> Iterator[_Span]:
    side = length if views.window is None else int(views.window / max(views.factors))
    if length <= side:
        yield _Span(0, length, 0, length)
        return
    side = side // ALIGNMENT * ALIGNMENT
    overlap = min(views.overlap, side // 2) // ALIGNMENT * ALIGNMENT
    count = -(-(length - overlap) // (side - overlap))
    starts = [index * (side - overlap) for index in range(count)]
    starts[-1] = -(-(length - side) // ALIGNMENT) * ALIGNMENT
    middles = [(left + side + right) // 2 for left, right in itertools.pairwise(starts)]
    seams = [middle // ALIGNMENT * ALIGNMENT for middle in middles]
    for start, first, last in zip(starts, [0, *seams], [*seams, length], strict=True):
        yield _Span(start, min(start + side, length), first, last)


def _look(
    model: SelectiveNetwork | Elsewhere,
    images: Tensor,
    labels: Tensor | None,
    way: Way,
    policy: MaskPolicy | None,
    views: Views,
) -> tuple[Prediction, Any]:
    """What all looks together find, and the last one's pass."""
    if views.is_single:
        run = model.start(images, labels).follow(way, policy)
        return single(run), run
    size, total, levels = (images.shape[2], images.shape[3]), torch.zeros(()), None
    seen: Sequence[int] = size
    common = _size(images, min(1.0, max(views.factors)))
    for scale in views.factors:
        look, truth = scaled(images, labels, scale)
        for mirrored in (False, True)[: 1 + views.flip]:
            shown = look.flip(3) if mirrored else look
            target = truth.flip(2) if mirrored and truth is not None else truth
            run = model.start(shown, target).follow(way, policy)
            probabilities = run.logits().softmax(1)
            probabilities = probabilities.flip(3) if mirrored else probabilities
            if probabilities.shape[2:] != common:
                probabilities = F.interpolate(probabilities, common, mode="bilinear", align_corners=False)
            total = probabilities.add_(total)
            if levels is None and run.mask is not None:
                levels, seen = run.levels, look.shape[2:]  # of the first look
    return at_size(total, levels, seen, size, model.strides[-1]), run


def at_size(
    scores: Tensor, levels: Tensor | None, seen: Sequence[int], size: tuple[int, int], block: int
) -> Prediction:
    """What was found in scaled images, at the size of the images themselves.

    Args:
        scores: logits or probabilities `[B, K, h, w]`; interpolated bilinearly.
        levels: int64 `[B, hc, wc]` of images of size `seen`, None when dense; each block gets that of the
            one in which its middle lies.
        block: side of a block, px.
    """
    if levels is not None:
        for axis, (length, scaled_to) in enumerate(zip(size, seen, strict=True), start=1):
            starts = torch.arange(0, length, block)
            middles = (starts + (starts + block).clamp(max=length)) / 2 * (scaled_to / length)
            levels = levels.index_select(axis, (middles / block).long().to(levels.device))
    same = tuple(scores.shape[2:]) == size
    return Prediction(scores.max(1).indices if same else _enlarged(scores, size), levels)


def _enlarged(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The classes of `[B, K, h, w]` at a larger size, bilinear. All pixels of all classes would not fit into
    memory: on the CPU those are made where classes meet, elsewhere a strip of rows at a time."""
    if scores.device.type == "cpu":
        return upsample_classes(scores, size, 1, 1)
    rows, columns = ((2 * torch.arange(length, device=scores.device) + 1) / length - 1 for length in size)
    strips = []
    for strip in rows.split(STRIP):
        grid = torch.stack(torch.meshgrid(strip, columns, indexing="ij")[::-1], -1).to(scores)
        grid = grid.expand(scores.shape[0], -1, -1, -1)
        near = F.grid_sample(scores, grid, padding_mode="border", align_corners=False)
        strips.append(near.max(1).indices)
    return torch.cat(strips, 1)


def single(run: Any) -> Prediction:
    """What a pass found."""
    return Prediction(run.classes(), None if run.mask is None else run.levels)


def scaled(images: Tensor, labels: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """Images `[B, 3, H, W]` and labels at a scale, bilinear with antialiasing and nearest; at 1 as they are.

    Raises:
        ValueError: too small there.
    """
    if scale == 1:
        return images, labels
    size = _size(images, scale)
    if min(size) < SMALLEST_SIDE:
        raise ValueError(f"images must be at least {SMALLEST_SIDE} px at a scale of {scale:g}")
    resized = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=scale < 1)
    if labels is None:
        return resized, None
    return resized, F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].long()


def _size(images: Tensor, scale: float) -> tuple[int, int]:
    return round(scale * images.shape[2]), round(scale * images.shape[3])
