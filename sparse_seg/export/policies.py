"""Mask policies in a static network: they ask a run, as in a pass; the highest scores give the blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_seg.export.upsample import Upsample
from sparse_seg.masks import MaskPolicy, blur_scores


@dataclass
class StaticRun:
    """What a policy may ask in a static network, see `masks.PolicyInput` (but what only bounds may); it is
    computed then.

    Args:
        images: normalised.
        last: features of the last stage before the mask.
        coarse: makes the coarse pass's logits on their grid.
        upsampled: of the grid of logits, at every so many pixels.
    """

    images: Tensor
    last: Tensor
    coarse: Callable[[], Tensor]
    upsampled: Callable[[Tensor, int], Tensor]
    labels: None = None

    def features(self) -> Tensor:
        return self.last

    def coarse_logits(self, every: int = 1, stored_dtype: torch.dtype | None = None) -> Tensor:
        return self.upsampled(self.coarse(), every)


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


class Choice(nn.Module):
    """A policy's scores.

    Args:
        policy: is copied.
        upsampling: makes the `Upsample` of logits to every so many pixels.
    """

    def __init__(self, policy: MaskPolicy, upsampling: Callable[[int], Upsample]) -> None:
        super().__init__()
        self.policy = copy.deepcopy(policy)
        for name, part in list(self.policy.named_modules()):
            if isinstance(part, nn.BatchNorm2d) and not part.affine:
                parent, _, own = name.rpartition(".")
                setattr(self.policy.get_submodule(parent), own, Normalisation(part))
        self.upsamples = nn.ModuleDict()
        self._upsampling = upsampling

    def forward(self, images: Tensor, features: Tensor, coarse: Callable[[], Tensor]) -> Tensor:
        """`[B, Hc, Wc]`; see `StaticRun`."""
        run: Any = StaticRun(images, features, coarse, self._upsample)
        return self.policy.scores(run)

    def _upsample(self, logits: Tensor, every: int) -> Tensor:
        if str(every) not in self.upsamples:
            self.upsamples[str(every)] = self._upsampling(every)
        return self.upsamples[str(every)](logits)


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
