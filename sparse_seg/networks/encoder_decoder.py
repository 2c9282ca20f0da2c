"""Backbone and head as one dense network, and the one place that makes it of a `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparse_seg.config import ModelConfig
from sparse_seg.errors import ConfigError
from sparse_seg.networks.heads import DENSE_SPACING, LOW_LEVEL_STRIDE, FCNHead, ToLowLevel
from sparse_seg.ops.upsample import at_least_float32, upsample_logits
from sparse_seg.registry import BACKBONES, HEADS, Registry, arguments_of

DEFAULT_NUM_CLASSES = 19  # Cityscapes
OF_BACKBONES = ("width", "depths", "stem", "shortcut", "entry_spacings", "dilate_second")


class EncoderDecoder(nn.Module):
    """Images to logits, dense at one output stride.

    Args:
        backbone: images `[B, 3, H, W]` to features `[B, C, h, w]`, finest first; its `stages` name the
            modules that give them, its `channels` are theirs.
        head: features to logits.
        output_stride: of the last feature, px; trained_stride: that the last upsampling was trained at.
        align_corners: of that.
        auxiliary: head on the last feature but one, for training.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        output_stride: int = 8,
        trained_stride: int = 8,
        align_corners: bool = False,
        auxiliary: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.auxiliary = backbone, head, auxiliary
        self.output_stride, self.trained_stride = output_stride, trained_stride
        self.align_corners = align_corners

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 3, H, W]` to logits `[B, K, H, W]`."""
        logits, size = self.head(self.backbone(images)), (images.shape[2], images.shape[3])
        strides = self.output_stride, self.trained_stride
        if getattr(self.head, "reads_low_level", False):
            strides = LOW_LEVEL_STRIDE, LOW_LEVEL_STRIDE
        return upsample_logits(at_least_float32(logits), size, *strides, self.align_corners)


def build_module(
    settings: ModelConfig, output_stride: int, trained_stride: int | None = None
) -> EncoderDecoder:
    """A dense network with fresh weights, at an output stride in px.

    Args:
        trained_stride: that the upsamplings keep the offset of; None: the settings'.

    Raises:
        ConfigError: impossible settings, or options that a part has not.
    """
    count = settings.num_classes or DEFAULT_NUM_CLASSES
    given = vars(settings) | {"output_stride": output_stride, "num_classes": count}
    backbone: Any = _made(BACKBONES, settings.backbone, given, settings.backbone_options)
    given["channels"] = backbone.channels
    head = _made(HEADS, settings.head, given, settings.head_options)
    auxiliary = FCNHead(backbone.channels[:-1], count, output_stride) if settings.auxiliary else None
    trained = settings.trained_stride if trained_stride is None else trained_stride
    for layer in head.modules():
        if isinstance(layer, ToLowLevel):
            layer.trained_stride = trained
    module = EncoderDecoder(backbone, head, output_stride, trained, settings.align_corners, auxiliary)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eps = settings.bn_eps
    return module


def _made(registry: Registry, name: str, given: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    """A part, of those of the settings that it has arguments for, and its own options."""
    accepted, default = arguments_of(registry[name]), ModelConfig()
    for setting in OF_BACKBONES if registry is BACKBONES else ():
        if setting not in accepted and given[setting] != getattr(default, setting):
            raise ConfigError(f"model.{setting}: the backbone {name!r} has no such setting; remove it")
    known = {one: value for one, value in given.items() if one in accepted and value is not None}
    taken = {one: f"model.{one}" for one in given}
    try:
        return registry.make(name, known, options, f"model.{registry.kind}_options", taken)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


def captured_stride(settings: ModelConfig) -> int:
    """The output stride at which a network of ours is captured: 8, at which dense 3x3 convolutions read the
    next cells; where convolutions on rows do so, too, the finest of the strides."""
    return DENSE_SPACING if settings.dilate_second else settings.own_strides[0]
