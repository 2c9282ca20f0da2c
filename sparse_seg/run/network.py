"""A network that runs dense or selectively, as a graph describes it."""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor

from sparse_seg.graph import fold_norms
from sparse_seg.run.passes import Pass
from sparse_seg.run.report import Report, report
from sparse_seg.run.segmentor import Segmentor, Tensors


class SelectiveNetwork(Segmentor):
    """A segmentation network that runs coarse everywhere and fine where a mask asks for it.

    One set of weights serves `net(images)` (mask by the policy), `net(images, fine_blocks=mask)` and
    `net.dense(images, output_stride=8)`; `net.start(images)` gives the pass behind them, and `net.module`
    holds the weights: the dense network that it was made of, or of a file its tensors alone.
    """

    def start(self, images: Tensor, labels: Tensor | None = None) -> Pass:
        """Start a pass over images; nothing is computed yet.

        Args:
            labels: int64 `[B, H, W]`, for policies that read them (oracle).
        """
        return Pass(self, images, labels)

    def for_inference(self) -> Self:
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
        with torch.no_grad():
            graph, tensors = fold_norms(self.graph, self.tensors)
        folded = type(self)(
            graph,
            Tensors({name: tensor.detach().clone() for name, tensor in tensors.items()}),
            {},
            copy.deepcopy(self.policy),
            self.settings,
            self.card,
        )
        folded.is_folded = True
        return folded.eval()

    def report(self) -> Report:
        """Where each convolution runs, its spacing and its multiply-adds, and what limits the gain."""
        return report(self)
