"""From config to network: the one place that reads a `ModelConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_seg.config import Config, MaskConfig, ModelConfig, model_config
from sparse_seg.errors import ConfigError
from sparse_seg.masks import (
    ORACLES,
    POLICIES,
    REDUCTIONS,
    RULES,
    UNCERTAINTIES,
    LearnedPolicy,
    MaskPolicy,
    mask_net,
)
from sparse_seg.models.heads import HEADS, FCNHead, HeadOptions
from sparse_seg.models.resnet import ResNet, first_selective_stage
from sparse_seg.models.segmentor import SelectiveSegmentor

DEFAULT_NUM_CLASSES = 19  # Cityscapes


def build_model(
    config: str | Path | Mapping[str, Any] | Config | ModelConfig,
    learned_net: Callable[[int, int], nn.Module] = mask_net,
) -> SelectiveSegmentor:
    """Build a network with fresh weights.

    Args:
        config: path of a YAML config, or a plain dict of model settings such as
            `{"backbone": "resnet50", "head": "lite", "num_classes": 19}`, with defaults for the rest.
        learned_net: makes the learned policy's net, of the channels that it reads and of how many cells a
            block is wide.

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
        net = None
        if settings.mask.policy == "learned":
            dense_stage = first_selective_stage(settings.strides[0]) - 1
            factor = settings.strides[-1] // settings.strides[0]
            net = learned_net(backbone.stage_channels[dense_stage], factor)
        policy = build_policy(settings.mask, settings.strides, net)
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
        backbone,
        head,
        policy,
        settings.trained_stride,
        auxiliary,
        tuple(settings.strides),
        settings.align_corners,
    )
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = settings.bn_eps
    return model


def build_policy(
    mask: MaskConfig, strides: Sequence[int] = (8, 16), net: nn.Module | None = None
) -> MaskPolicy:
    """The mask policy of a config.

    Args:
        net: of the learned policy, shared, not copied.

    Raises:
        ValueError: settings the policy refuses.
        ConfigError: a learned policy without a net.
    """
    if mask.policy == "learned" and net is None:
        raise ConfigError("this network has no learned mask: train one (see configs/camvid_mask.yaml)")
    fine, middle = "threshold", "middle_threshold"
    if mask.threshold is None:
        fine, middle = "fine_fraction", "middle_fraction"
    cut = {name: getattr(mask, name) for name in ((fine, middle) if len(strides) == 3 else (fine,))}
    own: dict[str, dict[str, Any]] = {"random": {"seed": mask.seed}, "edge": {"rule": mask.edge}}
    own["oracle"] = {"rule": mask.oracle}
    own["confidence"] = {name: getattr(mask, name) for name in ("uncertainty", "reduce", "neighbours")}
    if mask.stored_dtype is not None:
        own["confidence"]["stored_dtype"] = getattr(torch, mask.stored_dtype)
    if net is not None:
        own["learned"] = {"net": net}
    return POLICIES[mask.policy](**cut, **own.get(mask.policy, {}), block=strides[-1], blur=mask.blur)


def policy_for(model: SelectiveSegmentor, mask: MaskConfig, spec: str | None = None) -> MaskPolicy:
    """A policy for a network, in eval mode: that of `mask`, or of `spec`, with the network's own trained net.

    Args:
        spec: a policy's name, with options behind a colon: `edge:cad`, `confidence:entropy,max,neighbours`.

    Raises:
        ConfigError: an unknown policy or option, or a learned one where the network has none.
    """
    net = model.policy.net if isinstance(model.policy, LearnedPolicy) else None
    settings = mask if spec is None else parse_policy(spec, mask)
    policy = build_policy(settings, model.strides, net)
    return policy.to(next(model.parameters(), torch.empty(0)).device).eval()


def parse_policy(spec: str, mask: MaskConfig) -> MaskConfig:
    """Mask settings with the policy and options that a text such as `edge:cad` names.

    Raises:
        ConfigError: an unknown policy or option.
    """
    name, _, options = spec.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"unknown mask policy {name!r}; choose one of {', '.join(POLICIES)}")
    valid: dict[str, dict[str, Any]] = {"blur": {"blur": True}}
    if name == "edge":
        valid |= {rule: {"edge": rule} for rule in RULES}
    elif name == "oracle":
        valid |= {rule: {"oracle": rule} for rule in ORACLES}
    elif name == "confidence":
        valid |= {value: {"uncertainty": value} for value in UNCERTAINTIES}
        valid |= {value: {"reduce": value} for value in REDUCTIONS} | {"neighbours": {"neighbours": True}}
    for option in filter(None, options.split(",")):
        if option not in valid:
            raise ConfigError(
                f"unknown option {option!r} in the mask policy {spec!r}; choose of {', '.join(valid)}"
            )
        mask = dataclasses.replace(mask, **valid[option])
    return dataclasses.replace(mask, policy=name)
