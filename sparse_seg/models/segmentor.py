"""The network: images -> stages on sites -> head -> logits. How it runs is a matter of passes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

from torch import Tensor

from sparse_seg.masks import block_levels
from sparse_seg.models.forms import fold_norms
from sparse_seg.models.layouts import dense_layouts, selective_layouts
from sparse_seg.models.network import Network
from sparse_seg.models.passes import Pass
from sparse_seg.models.predicting import Predicting
from sparse_seg.models.refinement import refine
from sparse_seg.sparse import SiteLayout


class SelectiveSegmentor(Predicting, Network):
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

    def refine(
        self,
        images: Tensor,
        fractions: Sequence[float] | None = None,
        milliseconds: float | None = None,
    ) -> Iterator[Tensor]:
        """Anytime prediction: ever better logits `[B, K, H, W]`; each step computes its new sites only.

        Args:
            fractions: rising shares of fine blocks, a result for each; 0 is the dense network at the coarsest
                stride. With three strides the policy's `middle_fraction` follows in rank.
            milliseconds: the time to spend, instead of fractions. The first result is the coarse network's,
                later ones come as long as a further step fits, by the cost measured so far.

        Blocks are ranked once, by the coarse pass (the model's policy if it reads that, else confidence with
        its defaults). Results after the first differ from one-shot ones only where new sites lie next to
        those of an earlier step.

        Raises:
            ValueError: both or neither given, fractions that do not rise, a time that is no number, or a
                model in training mode.
        """
        return (step.logits for step in refine(self, images, fractions, milliseconds))

    def for_inference(self) -> SelectiveSegmentor:
        """A copy for prediction only: batch norm folded into weights, no autograd, no auxiliary head.

        The same interface and numbers (to 1e-5). Of such a network, itself. An exported network is faster
        (`sparse_seg.export`).

        Raises:
            ValueError: the model is in training mode (its batch statistics cannot be folded).
        """
        if self.is_folded:
            return self
        if self.training:
            raise ValueError("call model.eval() before for_inference(): batch statistics cannot be folded")
        folded = copy.deepcopy(self)
        folded.auxiliary, folded.is_folded = None, True
        fold_norms(folded.backbone)
        fold_norms(folded.head)
        return folded.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> SelectiveSegmentor:
        """As `nn.Module.train`; a folded network refuses to train.

        Raises:
            ValueError: the network is a folded one.
        """
        if mode and self.is_folded:
            raise ValueError("a network made by for_inference() cannot train: train the one it was made of")
        return super().train(mode)

    def selective_layouts(self, images: Tensor, fine_blocks: Tensor) -> list[SiteLayout]:
        """Layouts of the four stages under a mask, see `layouts.selective_layouts`."""
        return selective_layouts(images, fine_blocks, self.strides)

    def dense_layouts(self, images: Tensor, output_stride: int) -> list[SiteLayout]:
        """Layouts of the four stages of the plain dense network."""
        return dense_layouts(images, output_stride)

    def fine_pixels(self, fine_blocks: Tensor, images: Tensor) -> Tensor:
        """The pixels of the blocks `[B, Hc, Wc]` that are at the finest stride, bool `[B, H, W]`."""
        fine, block = block_levels(fine_blocks, self.strides) == len(self.strides) - 1, self.strides[-1]
        height, width = images.shape[2:]
        return fine.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :height, :width]
