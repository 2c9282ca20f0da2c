"""Mask policies in a static network: they ask a run, as in a pass; the highest scores give the blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_seg.errors import SparseSegError
from sparse_seg.export.upsample import Upsample
from sparse_seg.masks import MaskPolicy, blur_scores


class StaticRun:
    """What a policy may ask in a static network, see `masks.Run`; what it asks for is computed then.

    Args:
        images: normalised.
        features: of the last stage before the mask.
        coarse: makes the coarse pass's logits on their grid.
        upsampled: of the grid of logits, at every so many pixels.
    """

    def __init__(
        self,
        images: Tensor,
        features: Tensor,
        coarse: Callable[[], Tensor],
        upsampled: Callable[[Tensor, int], Tensor],
    ) -> None:
        self.images, self._features, self._coarse, self._upsampled = images, features, coarse, upsampled

    @property
    def labels(self) -> Tensor:
        raise SparseSegError("a mask policy that reads labels cannot be exported; use --policy given")

    def features(self) -> Tensor:
        return self._features

    def coarse_logits(self, every: int = 1, stored_dtype: torch.dtype | None = None) -> Tensor:
        return self._upsampled(self._coarse(), every)

    def dense_classes(self) -> tuple[Tensor, Tensor]:
        raise SparseSegError(
            "a mask policy that runs the dense network cannot be exported; use --policy given"
        )


class Choice(nn.Module):
    """A policy's scores.

    Args:
        policy: is copied.
        upsampling: makes the `Upsample` of logits to every so many pixels.
    """

    def __init__(self, policy: MaskPolicy, upsampling: Callable[[int], Upsample]) -> None:
        super().__init__()
        self.policy = copy.deepcopy(policy)
        self.upsamples = nn.ModuleDict()
        self._upsampling = upsampling

    def forward(self, images: Tensor, features: Tensor, coarse: Callable[[], Tensor]) -> Tensor:
        """`[B, Hc, Wc]`; see `StaticRun`."""
        return self.policy.scores(StaticRun(images, features, coarse, self._upsample))

    def _upsample(self, logits: Tensor, every: int) -> Tensor:
        if str(every) not in self.upsamples:
            self.upsamples[str(every)] = self._upsampling(every)
        return self.upsamples[str(every)](logits)


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
