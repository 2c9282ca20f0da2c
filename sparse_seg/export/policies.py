"""Mask policies in a static network: they ask a run, as in a pass; the highest scores give the blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_seg.masks import MaskPolicy, blur_scores


@dataclass
class StaticRun:
    """What a policy may ask in a static network, see `masks.PolicyInput` (but what only bounds may); it is
    computed then.

    Args:
        images: normalised.
        last: features of the last stage before the mask.
        coarse: makes the coarse pass's logits at every so many pixels.
    """

    images: Tensor
    last: Tensor
    coarse: Callable[[int], Tensor]
    labels: None = None

    def features(self) -> Tensor:
        return self.last

    def coarse_logits(self, every: int = 1, stored_dtype: torch.dtype | None = None) -> Tensor:
        return self.coarse(every)


class Normalisation(nn.Module):
    """A batch norm of inputs, in eval mode, as arithmetic: ONNX's operator wants a number of channels that
    the exporter may have lost."""

    mean: Tensor
    scale: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self.register_buffer("mean", norm.running_mean[:, None, None].clone(), persistent=False)
        scale = (norm.running_var + norm.eps).rsqrt()
        self.register_buffer("scale", scale[:, None, None], persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.mean) * self.scale


def static_policy(policy: MaskPolicy) -> MaskPolicy:
    """A copy whose scores can be traced."""
    policy = copy.deepcopy(policy)
    for name, part in list(policy.named_modules()):
        if isinstance(part, nn.BatchNorm2d) and not part.affine:
            parent, _, own = name.rpartition(".")
            setattr(policy.get_submodule(parent), own, Normalisation(part))
    return policy


class Ranking(NamedTuple):
    """The blocks of the highest scores: how many of an image get the finest stride, and with three strides
    the middle one; and whether scores are blurred before."""

    fine: int
    middle: int
    blur: bool

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores `[B, Hc, Wc]` to block numbers `[B, fine + middle]`, in rank."""
        scores = blur_scores(scores) if self.blur else scores
        flat, count = scores.flatten(1), self.fine + self.middle
        if torch.jit.is_tracing():  # ONNX's TopK takes equal scores in raster order
            return flat.topk(count, 1).indices
        return flat.sort(dim=1, descending=True, stable=True).indices[:, :count]
