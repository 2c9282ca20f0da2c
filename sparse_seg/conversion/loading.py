"""Converted files to networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sparse_seg.config import Config, ModelConfig, check_model, num_classes
from sparse_seg.conversion import cad
from sparse_seg.conversion.converted import Description, network_tensors, read_converted, read_description
from sparse_seg.errors import CheckpointError
from sparse_seg.masks import cad_mask_net
from sparse_seg.models.build import build_model
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.models.weights import load_weights, part_of

# of the model: how it runs, not what it computes dense
RUN_SETTINGS = ("mask", "exchange", "engine", "strides")


def load_converted(path: str | Path, config: Config | None = None) -> SelectiveSegmentor:
    """The network of a converted file, in eval mode. Policy `learned` runs the mask net that is in the file.

    Args:
        config: gives mask, exchange, engine, strides and, for the check of classes, the dataset; what the
            network is stands in the file.

    Raises:
        CheckpointError: missing, truncated or foreign file, a backbone without a head, a class count that is
            not the config's, or no mask net for policy `learned`.
        ConfigError: a mask net that does not fit the strides.
    """
    tensors, description = read_converted(path)
    settings = _settings(description, config, path)
    if not description.has_head:
        raise CheckpointError(
            f"{path} holds a backbone without a head; train one from it: --set model.pretrained={path}"
        )
    weights = network_tensors(tensors)
    if settings.mask.policy == "learned":
        weights |= _policy_weights(tensors, path)
    model = build_model(settings, cad_mask_net)  # no other source has a mask net
    load_weights(model, weights, path)
    return model.eval()


def load_backbone(path: str | Path) -> SelectiveSegmentor:
    """A network with the backbone of a converted file and a fresh head, in eval mode.

    Raises:
        CheckpointError: missing, truncated or foreign file.
    """
    tensors, description = read_converted(path)
    model = build_model(description.config)
    load_weights(model.backbone, part_of(tensors, "backbone."), path)
    return model.eval()


def run_config(path: str | Path, config: Config) -> Config:
    """The config with the network of a converted file in place of its own.

    Raises:
        CheckpointError: as `load_converted`, but for a backbone alone.
    """
    description = read_description(path)
    return dataclasses.replace(config, model=_settings(description, config, path))


def _policy_weights(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    net = part_of(tensors, cad.KEPT_MASK_NET)
    if not net:
        raise CheckpointError(
            f"{path} holds no learned mask: train one with model.pretrained={path} (see "
            "configs/camvid_mask.yaml), or choose another model.mask.policy"
        )
    return {f"policy.net.{name}": tensor for name, tensor in cad.score_weights(net).items()}


def _settings(description: Description, config: Config | None, path: str | Path) -> ModelConfig:
    settings = description.config
    if config is None:
        return settings
    own, asked = settings.num_classes, num_classes(config)
    if description.has_head and own != asked:
        raise CheckpointError(
            f"{path} has {own} classes, but {asked} are asked for (by model.num_classes or data.dataset "
            f"{config.data.dataset}); choose the dataset that the network was trained on"
        )
    settings = dataclasses.replace(settings, **{key: getattr(config.model, key) for key in RUN_SETTINGS})
    check_model(settings)
    return settings
