"""What a network is made of, and the settings that a pass over images reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

from torch import nn

from sparse_seg.config import MaskConfig
from sparse_seg.masks import MaskPolicy
from sparse_seg.models.base import Segmentor
from sparse_seg.models.card import Card
from sparse_seg.models.heads import Head
from sparse_seg.models.resnet import ResNet


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


class Network(Segmentor):
    """Backbone, head and policy; `SelectiveSegmentor` runs them.

    Args:
        backbone, head, policy: built by `build_model`.
        trained_stride: output stride the head's last upsampling was trained at, in pixels.
        auxiliary: head on the last stage but one, used in training only.
        align_corners: of the last upsampling.
        strides, mask, merge, card: see `Segmentor`.
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
        super().__init__(policy, strides, mask, merge, card)
        self.backbone, self.head, self.auxiliary = backbone, head, auxiliary
        self.trained_stride, self.align_corners = trained_stride, align_corners

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return self.head.num_classes

    @property
    def first_selective(self) -> int:
        """Index of the first stage whose stride the mask decides."""
        return sum(stage.stride <= self.strides[0] for stage in self.backbone.stages)

    @cached_property
    def exchange(self) -> str:  # type: ignore[override]
        """The exchange rule of the layers on sites, all of which have the same."""
        layers = (layer for layer in self.backbone.modules() if hasattr(layer, "exchange"))
        return str(next(layers).exchange)

    @cached_property
    def has_undilated(self) -> bool:  # type: ignore[override]
        """Whether some convolution's taps depend on the mask (`model.dilate_second: false`)."""
        return any(getattr(module, "spacing", 0) is None for module in self.modules())
