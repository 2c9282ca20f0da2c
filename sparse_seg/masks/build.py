"""Mask policies from a config, or from a text such as `edge:cad`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from sparse_seg.config import MaskConfig
from sparse_seg.config.keys import choices
from sparse_seg.errors import ConfigError, choose_one, shown
from sparse_seg.masks.base import MaskPolicy
from sparse_seg.registry import POLICIES

CUTS = ("fine_fraction", "threshold", "middle_fraction", "middle_threshold")


def build_policy(
    mask: MaskConfig, strides: Sequence[int] = (8, 16), net: nn.Module | None = None
) -> MaskPolicy:
    """The mask policy of a config.

    Args:
        net: of a policy that is trained, shared, not copied.

    Raises:
        ValueError: settings the policy refuses.
        ConfigError: a policy that is trained without a net.
    """
    policy = POLICIES[mask.policy]
    fine, middle = "threshold", "middle_threshold"
    if mask.threshold is None:
        fine, middle = "fine_fraction", "middle_fraction"
    cut = {name: getattr(mask, name) for name in ((fine, middle) if len(strides) == 3 else (fine,))}
    own: dict[str, Any] = {argument: getattr(mask, key) for key, argument in policy.OPTIONS.items()}
    taken = dict.fromkeys((*CUTS, "blur"), "") | {argument: key for key, argument in policy.OPTIONS.items()}
    keys = {argument: f"model.mask.{key or argument}" for argument, key in taken.items()}
    keys["block"] = "model.strides"
    if policy.needs_net:
        if net is None:
            raise ConfigError(
                f"this network has no {mask.policy} mask: set model.mask.policy={mask.policy} if its "
                "checkpoint has one, or make one (docs/masks.md)"
            )
        own["net"] = net
    own |= {**cut, "block": strides[-1], "blur": mask.blur}
    made: MaskPolicy = POLICIES.make(mask.policy, own, mask.options, "model.mask.options", keys)
    return made


def parse_policy(spec: str, mask: MaskConfig) -> MaskConfig:
    """Mask settings with the policy and options that a text such as `edge:cad` names.

    Raises:
        ConfigError: an unknown policy or option.
    """
    if not isinstance(spec, str):
        raise ConfigError(f"a mask policy is a name, as 'confidence' or 'edge:cad', not {shown(spec)}")
    name, _, words = spec.partition(":")
    if name not in POLICIES:
        raise ConfigError(f"unknown mask policy {choose_one(name, POLICIES)}")
    valid: dict[str, dict[str, Any]] = {"blur": {"blur": True}}
    for key in POLICIES[name].OPTIONS:
        if isinstance(getattr(mask, key), bool):
            valid[key] = {key: True}
        valid |= {value: {key: value} for value in choices(MaskConfig, key)}
    for word in filter(None, words.split(",")):
        if word not in valid:
            raise ConfigError(f"mask policy {shown(spec)}: unknown option {choose_one(word, valid)}")
        mask = dataclasses.replace(mask, **valid[word])
    options = mask.options if name == mask.policy else {}  # another policy has none of them
    return dataclasses.replace(mask, policy=name, options=options)
