"""Static forms of the mask policies: scores of blocks, and the numbers of those that become fine."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg.errors import SparseSegError
from sparse_seg.export.upsample import Upsample, grid_size
from sparse_seg.masks import ConfidencePolicy, EdgePolicy, LearnedPolicy, MaskPolicy, blur_scores
from sparse_seg.masks.edge import CAD_BLOCK, cad_edges, gradient_magnitude
from sparse_seg.masks.oracle import label_boundary


class Choice(nn.Module):
    """A policy that ranks blocks.

    Args:
        policy: of the model.
        reads: what the scores are made of: `images` (normalised), `features` (of the last dense stage),
            `logits` (of the coarse pass), or `blocks`, an input of the graph.
    """

    reads = "blocks"

    def scores(self, read: Tensor) -> Tensor:
        """`[B, Hc, Wc]`."""
        raise NotImplementedError


class EdgeChoice(Choice):
    reads = "images"

    def __init__(self, policy: EdgePolicy) -> None:
        super().__init__()
        self.rule, self.block = policy.rule, policy.block

    def scores(self, read: Tensor) -> Tensor:
        if self.rule == "sobel":
            return F.max_pool2d(gradient_magnitude(read), self.block, ceil_mode=True)[:, 0]
        edges = cad_edges(read)
        height, width = (-(-int(length) // self.block) for length in read.shape[2:])
        factor = CAD_BLOCK // self.block
        return edges.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, :height, :width]


class LearnedChoice(Choice):
    reads = "features"

    def __init__(self, policy: LearnedPolicy) -> None:
        super().__init__()
        self.net = policy.net

    def scores(self, read: Tensor) -> Tensor:
        return self.net(read)[:, 0]


class ConfidenceChoice(Choice):
    """The uncertainty of the coarse pass's logits, every `sample` px.

    Args:
        size, stride, trained_stride, align_corners: of the logits' upsampling, see `Upsample`.
        classes: K.
    """

    reads = "logits"
    ones: Tensor

    def __init__(
        self,
        policy: ConfidencePolicy,
        size: tuple[int, int],
        stride: int,
        trained_stride: int,
        align_corners: bool,
        classes: int,
    ) -> None:
        super().__init__()
        self.uncertainty, self.reduce, self.neighbours = policy.uncertainty, policy.reduce, policy.neighbours
        self.window = policy.block // policy.sample
        self.upsample = Upsample(
            grid_size(size, stride), size, stride, trained_stride, align_corners, policy.sample
        )
        self.register_buffer("ones", torch.ones(1, classes), persistent=False)

    def scores(self, read: Tensor) -> Tensor:
        if self.uncertainty == "entropy":
            values = self._entropy(read)
        else:
            logits = self.upsample(read)
            if self.uncertainty == "margin":
                first, second = logits.softmax(1).topk(2, 1).values.unbind(1)
                values = 1 - (first - second)
            else:
                values = label_boundary(logits.max(1).indices, ignore_index=-1).float()
        pool = F.max_pool2d if self.reduce == "max" else F.avg_pool2d
        scores = pool(values[:, None], self.window, ceil_mode=True)
        if self.neighbours:
            scores = F.max_pool2d(scores, 3, stride=1, padding=1)
        return scores[:, 0]

    def _entropy(self, logits: Tensor) -> Tensor:
        """`[B, ...]` over its largest value.

        Each cell's largest logit is taken off before the upsampling: the entropy stays, no exponential
        overflows, and it is less work than at every place.
        """
        logits = logits - logits.amax(1, keepdim=True)
        logits = self.upsample(logits)
        batch, classes, height, width = map(int, logits.shape)
        flat = logits.reshape(batch, classes, height * width)
        powers = flat.exp()
        total = torch.matmul(self.ones, powers).clamp(min=1e-37)
        mean = torch.matmul(self.ones, powers * flat) / total
        return ((total.log() - mean) / math.log(classes)).reshape(batch, height, width)


class Ranking(nn.Module):
    """The blocks of the highest scores.

    Args:
        fine, middle: how many blocks of an image get the finest stride, and with three strides the middle
            one.
    """

    def __init__(self, fine: int, middle: int, blur: bool) -> None:
        super().__init__()
        self.fine, self.middle, self.blur = fine, middle, blur

    def forward(self, scores: Tensor) -> Tensor:
        """Scores `[B, Hc, Wc]` to block numbers `[B, fine + middle]`, in rank."""
        scores = blur_scores(scores) if self.blur else scores
        flat, count = scores.flatten(1), self.fine + self.middle
        if torch.jit.is_tracing():  # ONNX's TopK takes equal scores in raster order
            return flat.topk(count, 1).indices
        return flat.sort(dim=1, descending=True, stable=True).indices[:, :count]


def static_choice(
    policy: MaskPolicy,
    size: tuple[int, int],
    stride: int,
    trained_stride: int,
    align_corners: bool,
    classes: int,
) -> Choice:
    """The static form of a policy.

    Raises:
        SparseSegError: it has none.
    """
    if isinstance(policy, ConfidencePolicy):
        return ConfidenceChoice(policy, size, stride, trained_stride, align_corners, classes)
    if isinstance(policy, EdgePolicy):
        return EdgeChoice(policy)
    if isinstance(policy, LearnedPolicy):
        return LearnedChoice(policy)
    name = type(policy).__name__.removesuffix("Policy").lower()
    raise SparseSegError(
        f"mask policy {name} cannot be exported; use --policy given, with the blocks as an input, or set "
        "model.mask.policy to confidence, edge or learned"
    )
