"""The network: images -> stages on sites -> head -> logits. How it runs is a matter of passes."""

from __future__ import annotations

import copy
from typing import Self

from torch import Tensor

from sparse_seg.models.forms import fold_norms
from sparse_seg.models.layouts import dense_layouts, selective_layouts
from sparse_seg.models.network import Network
from sparse_seg.models.passes import Pass
from sparse_seg.sparse import SiteLayout


class SelectiveSegmentor(Network):
    """A segmentation network that runs coarse everywhere and fine where a mask asks for it.

    One set of weights serves `model(images)` (mask by the policy), `model(images, fine_blocks=mask)` and
    `model.dense(images, output_stride=8)`; `model.start(images)` gives the pass behind them.
    """

    def start(self, images: Tensor, labels: Tensor | None = None) -> Pass:
        """Start a pass over images; nothing is computed yet.

        Args:
            labels: int64 `[B, H, W]`, for policies that read them (oracle).
        """
        return Pass(self, images, labels)

    def for_inference(self) -> Self:
        if self.is_folded:
            return self
        self.require_eval()
        folded = copy.deepcopy(self)
        folded.auxiliary, folded.is_folded = None, True
        fold_norms(folded.backbone)
        fold_norms(folded.head)
        return folded.eval().requires_grad_(False)

    def selective_layouts(self, images: Tensor, fine_blocks: Tensor) -> list[SiteLayout]:
        """Layouts of the four stages under a mask, see `layouts.selective_layouts`."""
        return selective_layouts(images, fine_blocks, self.strides)

    def dense_layouts(self, images: Tensor, output_stride: int) -> list[SiteLayout]:
        """Layouts of the four stages of the plain dense network."""
        return dense_layouts(images, output_stride)
