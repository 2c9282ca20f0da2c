"""From config to network: the one place that reads a `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sparse_seg.config import model_config
from sparse_seg.errors import ConfigError
from sparse_seg.masks import POLICIES, MaskPolicy
from sparse_seg.models.heads import HEADS, FCNHead, HeadOptions
from sparse_seg.models.resnet import ResNet
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.schema import Config, MaskConfig, ModelConfig

DEFAULT_NUM_CLASSES = 19  # Cityscapes


def build_model(config: str | Path | Mapping[str, Any] | Config | ModelConfig) -> SelectiveSegmentor:
    """Build a network with fresh weights.

    Args:
        config: path of a YAML config, or a plain dict of model settings such as
            `{"backbone": "resnet50", "head": "lite", "num_classes": 19}`, with defaults for the rest.

    Raises:
        ConfigError: unknown key, wrong type or impossible value, naming the key.
    """
    settings = model_config(config)
    num_classes = settings.num_classes or DEFAULT_NUM_CLASSES
    try:
        backbone = ResNet(
            settings.backbone,
            settings.width,
            settings.exchange,
            settings.engine,
            settings.stem,
            settings.shortcut,
            settings.entry_spacings,
            settings.dilate_second,
            settings.depths,
        )
        policy = build_policy(settings.mask)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    head = HEADS[settings.head](
        HeadOptions(
            in_channels=backbone.stage_channels[3],
            low_level_in_channels=backbone.stage_channels[0],
            num_classes=num_classes,
            channels=settings.head_channels,
            spacings=[rate * settings.trained_stride for rate in settings.aspp_rates],
            exchange=settings.exchange,
            engine=settings.engine,
            trained_stride=settings.trained_stride,
            aspp_separable=settings.aspp_separable,
            separable=settings.separable,
            aspp_projection=settings.aspp_projection,
            refine=settings.refine,
            low_level_channels=settings.low_level_channels,
            decoder_convs=settings.decoder_convs,
            align_corners=settings.align_corners,
        )
    )
    auxiliary = None
    if settings.auxiliary:
        auxiliary = FCNHead(backbone.stage_channels[2], backbone.stage_channels[2] // 4, num_classes)
    model = SelectiveSegmentor(
        backbone, head, policy, settings.trained_stride, auxiliary, settings.align_corners
    )
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = settings.bn_eps
    return model


def build_policy(mask: MaskConfig) -> MaskPolicy:
    """The mask policy of a config.

    Raises:
        ValueError: settings the policy refuses.
    """
    cut = (
        {"threshold": mask.threshold} if mask.threshold is not None else {"fine_fraction": mask.fine_fraction}
    )
    seed = {"seed": mask.seed} if mask.policy == "random" else {}
    return POLICIES[mask.policy](**cut, **seed)
