"""What every selective network has, however it runs: strides, a policy, refinement."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from sparse_seg.config import MaskConfig
from sparse_seg.masks import POLICIES, MaskPolicy, block_levels, build_policy
from sparse_seg.models.card import Card
from sparse_seg.models.predicting import Predicting
from sparse_seg.models.refinement import refine
from sparse_seg.models.way import Way
from sparse_seg.sparse import SEPARATE


class Segmentor(Predicting, nn.Module):
    """A segmentation network that runs coarse everywhere and fine where a mask asks for it.

    Args:
        policy: chooses the fine blocks.
        strides: strides in pixels between which the mask chooses, finest first, each twice the one before.
            A block is one cell of the coarsest grid.
        mask: settings of the policies that a `Way` names.
        merge: what pixels of coarse blocks get: `whole`, the head decodes the densified rows everywhere; or
            `patch`, see `models/patch.py`.
        card: what input and output mean; of a checkpoint's network.
    """

    exchange: str  # rule of what is read where there is no site
    has_undilated: bool  # whether some convolution's taps depend on the mask
    num_classes: int
    dense_stride = 8  # output stride of a dense training, where none is set
    norms_vectors = False  # whether a norm sees one value of each image

    def __init__(
        self,
        policy: MaskPolicy,
        strides: tuple[int, ...],
        mask: MaskConfig | None = None,
        merge: str = "whole",
        card: Card | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.strides, self.mask = policy, strides, mask or MaskConfig()
        self.merge, self.card = merge, card
        self.is_folded = False  # whether it was made by `for_inference`

    @property
    def device(self) -> torch.device:
        """Where its tensors are; a folded network may have no parameters."""
        return next(itertools.chain(self.parameters(), self.buffers()), torch.empty(0)).device

    def policy_for(self, way: Way) -> MaskPolicy:
        """The policy of a selective way: the model's own, or the one that the way names, in eval mode.

        Raises:
            ConfigError: an unknown policy or option, or a learned one where the network has none.
        """
        if way.mask is None and way.fine_fraction is None and way.middle_fraction is None:
            return self.policy
        settings = way.mask_config(self.mask)
        net = getattr(self.policy, "net", None) if type(self.policy) is POLICIES[settings.policy] else None
        policy = build_policy(settings, self.strides, net)
        return policy.to(self.device).eval()

    def separates(self, way: Way) -> bool:
        """Whether levels do not read each other."""
        return (way.exchange or self.exchange) == SEPARATE

    def refines(self, way: Way) -> bool:
        """Whether a coarse pass can be refined (P4): it stays as it is when blocks become fine (P1)."""
        return not self.has_undilated and not self.separates(way)

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

    @abstractmethod
    def for_inference(self) -> Self:
        """A copy for prediction only: batch norm folded into weights, no autograd, no auxiliary head.

        The same interface and numbers (to 1e-5). Of such a network, itself. An exported network is faster
        (`sparse_seg.export`).

        Raises:
            ValueError: the model is in training mode (its batch statistics cannot be folded).
        """

    def require_eval(self) -> None:
        """Raises a ValueError in training mode, in which no norm can be folded."""
        if self.training:
            raise ValueError("call model.eval() before for_inference(): batch statistics cannot be folded")

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; a folded network refuses to train.

        Raises:
            ValueError: the network is a folded one.
        """
        if mode and self.is_folded:
            raise ValueError("a network made by for_inference() cannot train: train the one it was made of")
        return super().train(mode)

    def fine_pixels(self, fine_blocks: Tensor, images: Tensor) -> Tensor:
        """The pixels of the blocks `[B, Hc, Wc]` that are at the finest stride, bool `[B, H, W]`."""
        fine, block = block_levels(fine_blocks, self.strides) == len(self.strides) - 1, self.strides[-1]
        height, width = images.shape[2:]
        return fine.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :height, :width]
