"""From config to network: the one place that reads a `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_seg.config import model_config
from sparse_seg.errors import ConfigError
from sparse_seg.masks import POLICIES, MaskPolicy
from sparse_seg.models.heads import HEADS, FCNHead
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
        backbone = ResNet(settings.backbone, settings.width, settings.exchange, settings.engine)
        policy = build_policy(settings.mask, settings.strides)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    spacings = [rate * settings.trained_stride for rate in settings.aspp_rates]
    head = HEADS[settings.head](
        backbone.stage_channels[3],
        num_classes,
        settings.head_channels,
        spacings,
        settings.exchange,
        settings.engine,
        settings.trained_stride,
    )
    auxiliary = None
    if settings.auxiliary:
        auxiliary = FCNHead(backbone.stage_channels[2], backbone.stage_channels[2] // 4, num_classes)
    return SelectiveSegmentor(
        backbone, head, policy, settings.trained_stride, auxiliary, tuple(settings.strides)
    )


def build_policy(mask: MaskConfig, strides: Sequence[int] = (8, 16)) -> MaskPolicy:
    """The mask policy of a config.

    Raises:
        ValueError: settings the policy refuses.
    """
    kind = "fraction" if mask.threshold is None else "threshold"
    cut: dict[str, Any] = {"fine_fraction": mask.fine_fraction} if kind == "fraction" else {}
    if kind == "threshold":
        cut = {"threshold": mask.threshold}
    if len(strides) == 3:
        cut[f"middle_{kind}"] = getattr(mask, f"middle_{kind}")
    own: dict[str, dict[str, Any]] = {"random": {"seed": mask.seed}, "edge": {"rule": mask.edge}}
    own["confidence"] = {name: getattr(mask, name) for name in ("uncertainty", "reduce", "neighbours")}
    if mask.stored_dtype is not None:
        own["confidence"]["stored_dtype"] = getattr(torch, mask.stored_dtype)
    return POLICIES[mask.policy](**cut, **own.get(mask.policy, {}), block=strides[-1])
