"""What a network is made of, and the settings that a pass over images reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import nn

from sparse_seg.config import MaskConfig
from sparse_seg.masks import POLICIES, MaskPolicy, build_policy
from sparse_seg.models.card import Card
from sparse_seg.models.heads import Head
from sparse_seg.models.resnet import ResNet
from sparse_seg.models.way import Way
from sparse_seg.sparse import SEPARATE


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the context; restores each module's own mode, since a frozen network mixes modes."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Network(nn.Module):
    """Backbone, head and policy; `SelectiveSegmentor` runs them.

    Args:
        backbone, head, policy: built by `build_model`.
        trained_stride: output stride the head's last upsampling was trained at, in pixels.
        auxiliary: head on the last stage but one, used in training only.
        strides: strides in pixels between which the mask chooses, finest first, each twice the one before.
            A block is one cell of the coarsest grid.
        align_corners: of the last upsampling.
        mask: settings of the policies that a `Way` names.
        merge: what pixels of coarse blocks get: `whole`, the head decodes the densified rows everywhere; or
            `patch`, see `models/patch.py`.
        card: what input and output mean; of a checkpoint's network.
    """

    def __init__(
        self,
        backbone: ResNet,
        head: Head,
        policy: MaskPolicy,
        trained_stride: int = 8,
        auxiliary: Head | None = None,
        strides: tuple[int, ...] = (8, 16),
        align_corners: bool = False,
        mask: MaskConfig | None = None,
        merge: str = "whole",
        card: Card | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.auxiliary = backbone, head, auxiliary
        self.policy, self.trained_stride, self.strides = policy, trained_stride, strides
        self.align_corners, self.mask = align_corners, mask or MaskConfig()
        self.merge, self.card = merge, card
        self.is_folded = False  # whether it was made by `for_inference`

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
        return policy.to(next(self.parameters(), torch.empty(0)).device).eval()

    @property
    def first_selective(self) -> int:
        """Index of the first stage whose stride the mask decides."""
        return sum(stage.stride <= self.strides[0] for stage in self.backbone.stages)

    @cached_property
    def exchange(self) -> str:
        """The exchange rule of the layers on sites, all of which have the same."""
        layers = (layer for layer in self.backbone.modules() if hasattr(layer, "exchange"))
        return str(next(layers).exchange)

    def separates(self, way: Way) -> bool:
        """Whether levels do not read each other."""
        return (way.exchange or self.exchange) == SEPARATE

    def refines(self, way: Way) -> bool:
        """Whether a coarse pass can be refined (P4): it stays as it is when blocks become fine (P1)."""
        return not self.has_undilated and not self.separates(way)

    @cached_property
    def has_undilated(self) -> bool:
        """Whether some convolution's taps depend on the mask (`model.dilate_second: false`)."""
        return any(getattr(module, "spacing", 0) is None for module in self.modules())
