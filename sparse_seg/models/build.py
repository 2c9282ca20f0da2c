"""From config to network: the one place that reads a `ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sparse_seg.config import Config, ModelConfig, model_config
from sparse_seg.config.schema import STRIDES
from sparse_seg.errors import ConfigError
from sparse_seg.masks import build_policy, mask_net
from sparse_seg.models.card import Card
from sparse_seg.models.heads import FCNHead, HeadOptions
from sparse_seg.models.resnet import ResNet
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.registry import BACKBONES, HEADS, POLICIES

DEFAULT_NUM_CLASSES = 19  # Cityscapes


def build_model(
    config: str | Path | Mapping[str, Any] | Config | ModelConfig,
    learned_net: Callable[[int, int], nn.Module] = mask_net,
    card: Card | None = None,
) -> SelectiveSegmentor:
    """Build a network with fresh weights.

    Args:
        config: path of a YAML config, or a plain dict of model settings such as
            `{"backbone": "resnet50", "head": "lite", "num_classes": 19}`, with defaults for the rest.
        learned_net: makes the net of a policy that is trained, of the channels that it reads and of how many
            cells a block is wide.
        card: what input and output mean, where it is known.

    Raises:
        ConfigError: unknown key, wrong type or impossible value, naming the key.
    """
    settings = model_config(config)
    num_classes, strides = settings.num_classes or DEFAULT_NUM_CLASSES, tuple(settings.own_strides)
    if list(strides) not in STRIDES:
        choices = ", ".join(map(str, STRIDES))
        raise ConfigError(f"model.strides is {list(strides)}; a network of ours has one of {choices}")
    architecture, head_class = BACKBONES[settings.backbone], HEADS[settings.head]
    more = settings.backbone_options
    key, taken = "model.backbone_options", {"pool": "model.shortcut"}
    more = BACKBONES.options(settings.backbone, more, key, architecture.block, taken)
    try:
        with BACKBONES.fitting(more, key):
            backbone = ResNet(
                architecture,
                settings.width,
                settings.exchange,
                settings.engine,
                settings.stem,
                settings.shortcut,
                settings.entry_spacings,
                settings.dilate_second,
                settings.depths,
                **more,
            )
        early = [stage for stage in backbone.stages if stage.stride <= strides[0]]
        factor = strides[-1] // strides[0]
        net = POLICIES[settings.mask.policy].make_net(early[-1].channels, factor, num_classes, learned_net)
        policy = build_policy(settings.mask, strides, net)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    first, *_, before_last, last = backbone.stages
    options = HeadOptions(
        in_channels=last.channels,
        low_level_in_channels=first.channels,
        num_classes=num_classes,
        channels=settings.head_channels,
        spacings=[rate * settings.trained_stride for rate in settings.aspp_rates],
        exchange=settings.exchange,
        engine=settings.engine,
        trained_stride=settings.trained_stride,
        aspp_separable=settings.aspp_separable,
        separable=settings.separable,
        refine_separable=settings.refine_separable,
        aspp_projection=settings.aspp_projection,
        refine=settings.refine,
        low_level_channels=settings.low_level_channels,
        decoder_convs=settings.decoder_convs,
        align_corners=settings.align_corners,
    )
    more = HEADS.options(settings.head, settings.head_options, "model.head_options")
    with HEADS.fitting(more, "model.head_options"):
        head, auxiliary = head_class(options, **more), None
    if settings.auxiliary:
        auxiliary = FCNHead(HeadOptions(before_last.channels, num_classes))
    model = SelectiveSegmentor(
        backbone,
        head,
        policy,
        settings.trained_stride,
        auxiliary,
        strides,
        settings.align_corners,
        settings.mask,
        merge=settings.merge,
        card=card,
    )
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = settings.bn_eps
    return model
