"""A network that a graph describes, with the interface of `build_model`'s."""

from __future__ import annotations

import copy
from typing import Self

import torch
from torch import Tensor

from sparse_seg.graph import fold_norms
from sparse_seg.run.passes import GraphPass
from sparse_seg.run.report import Report, report
from sparse_seg.run.segmentor import GraphSegmentor, Tensors


class SelectiveNetwork(GraphSegmentor):
    """A captured network, run dense at any stride or selectively between its strides."""

    def start(self, images: Tensor, labels: Tensor | None = None) -> GraphPass:
        """Start a pass over images; nothing is computed yet.

        Args:
            labels: int64 `[B, H, W]`, for policies that read them (oracle).
        """
        return GraphPass(self, images, labels)

    def for_inference(self) -> Self:
        if self.is_folded:
            return self
        self.require_eval()
        with torch.no_grad():
            graph, tensors = fold_norms(self.graph, self.tensors)
        folded = type(self)(
            graph,
            Tensors({name: tensor.detach().clone() for name, tensor in tensors.items()}),
            {},
            copy.deepcopy(self.policy),
            self.strides,
            self.mask,
            self.exchange,
            self.card,
            self.merge,
            self.engine,
        )
        folded.is_folded = True
        return folded.eval()

    def report(self) -> Report:
        """Where each convolution runs, its spacing and its multiply-adds, and what limits the gain."""
        return report(self)
