"""Converted files to networks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sparse_seg.checks import num_classes
from sparse_seg.conversion.converted import Description, network_tensors, read_converted, read_description
from sparse_seg.errors import CheckpointError
from sparse_seg.models.build import build_model
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.models.weights import load_weights, part_of
from sparse_seg.schema import Config, ModelConfig

RUN_SETTINGS = ("mask", "exchange", "engine")  # of the model: how it runs, not what it computes dense


def load_converted(path: str | Path, config: Config | None = None) -> SelectiveSegmentor:
    """The network of a converted file, in eval mode.

    Args:
        config: gives mask, exchange, engine and, for the check of classes, the dataset; what the network is
            stands in the file.

    Raises:
        CheckpointError: missing, truncated or foreign file, a backbone without a head, or a class count that
            is not the config's.
    """
    tensors, description = read_converted(path)
    settings = _settings(description, config, path)
    if not description.has_head:
        raise CheckpointError(
            f"{path} holds a backbone without a head; train one from it: --set model.pretrained={path}"
        )
    model = build_model(settings)
    load_weights(model, network_tensors(tensors), path)
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
    return dataclasses.replace(settings, **{key: getattr(config.model, key) for key in RUN_SETTINGS})
