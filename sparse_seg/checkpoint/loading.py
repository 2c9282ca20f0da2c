"""Checkpoints to networks: which settings a config may change, and which weights are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_seg.checkpoint.captured import captured_network, recaptured
from sparse_seg.checkpoint.content import ASIDE, AUXILIARY, MODULE, POLICY, Checkpoint
from sparse_seg.checkpoint.file import load
from sparse_seg.config import (
    RUN_SETTINGS,
    Config,
    ModelConfig,
    check_model,
    function_keys,
    model_config,
    num_classes,
)
from sparse_seg.data import dataset_classes
from sparse_seg.errors import CheckpointError
from sparse_seg.graph.file import first_difference
from sparse_seg.networks.encoder_decoder import captured_stride
from sparse_seg.registry import POOLING_HEADS
from sparse_seg.run.build import build_model, with_strides
from sparse_seg.run.card import Card
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.weights import load_weights, part_of


def load_model(path: str | Path, config: Config | None = None) -> SelectiveNetwork:
    """The network of a checkpoint, in eval mode: of training (averaged weights where it kept them) or
    converted.

    Args:
        config: how to run it: mask, engine, exchange, strides. For a network trained here the rest must say
            the same network as the file; of a converted one the file alone says what it is.

    Raises:
        CheckpointError: missing, damaged or foreign file, or one that does not fit the config.
        ConfigError: a learned mask's net that does not fit the strides.
    """
    return network_of(load(path), config)


def network_of(checkpoint: Checkpoint, config: Config | None = None) -> SelectiveNetwork:
    """See `load_model`."""
    path = checkpoint.path
    if not checkpoint.origin.has_head:
        raise CheckpointError(
            f"{path} holds a backbone without a head; train one from it: --set model.pretrained={path}"
        )
    chosen = network_settings(checkpoint, config)
    if chosen.module is None:
        chosen = with_strides(chosen)
        # the graph of an earlier file's, or where another output stride is the one to capture
        if checkpoint.captured is None or captured_stride(chosen) != captured_stride(checkpoint.config):
            checkpoint = recaptured(checkpoint, chosen)
    return captured_network(checkpoint, chosen, read_card(checkpoint, config))


def read_card(checkpoint: Checkpoint, config: Config | None = None) -> Card:
    """What a network's input and output mean: as the file says, else a config's data, else `Card.unnamed`."""
    count = checkpoint.config.num_classes or 0
    names, colours = checkpoint.classes, checkpoint.colours
    ids, unnamed = checkpoint.training.get("ids"), Card.unnamed(count)
    if config is not None and names is None:
        known = dataset_classes(config.data.dataset, config.data.root)
        names, colours, ids = known.classes.names, known.classes.palette, known.ids
    if not ids or len(ids) != count or not all(type(value) is int and 0 <= value <= 255 for value in ids):
        ids = unnamed.ids
    scaling = checkpoint if config is None else config.data
    frame, crop = _size(checkpoint.training.get("frame")), None
    with suppress(LookupError, TypeError):
        crop = _size(checkpoint.training["config"]["data"]["crop"])
    # files of earlier versions tell the crop alone: frames may have been twice as high and wide
    at_most = crop and (2 * crop[0], 2 * crop[1])
    names, colours = names or unnamed.names, colours or unnamed.colours
    return Card(names, colours, tuple(ids), scaling.mean, scaling.std, frame, at_most)


def _size(value: Any) -> tuple[int, int] | None:
    """Height and width, px, where a file says that."""
    is_size = isinstance(value, list) and len(value) == 2
    is_size = is_size and all(type(side) is int and 0 < side < 2**20 for side in value)
    return (value[0], value[1]) if is_size else None


def load_backbone(path: str | Path) -> SelectiveNetwork:
    """A network with the backbone of a checkpoint and a fresh head, in eval mode.

    Raises:
        CheckpointError: missing, damaged or foreign file.
    """
    checkpoint = load(path)
    model = build_model(checkpoint.config)
    load_weights(model.module.backbone, part_of(checkpoint.weights, f"{MODULE}backbone."), path)
    return model.eval()


def network_settings(checkpoint: Checkpoint, config: Config | None = None) -> ModelConfig:
    """Settings of the network that `load_model` builds.

    Raises:
        CheckpointError: the config asks for another network than the file holds.
    """
    if config is None:
        return checkpoint.config
    check_fits(checkpoint, config, checkpoint.origin.is_trained_here)
    if checkpoint.origin.is_trained_here:
        result = model_config(config)
    else:
        own = {key: getattr(config.model, key) for key in RUN_SETTINGS}
        result = dataclasses.replace(checkpoint.config, **own)
    if checkpoint.config.module is not None and result.strides is None:
        result = dataclasses.replace(result, strides=checkpoint.config.strides)
    check_model(result)
    return result


def initial_weights(checkpoint: Checkpoint, model: SelectiveNetwork, config: Config) -> dict[str, Tensor]:
    """Weights for training that starts from a checkpoint; a mask net and an auxiliary head stay as they are
    in `model` where the checkpoint has none.

    Raises:
        CheckpointError: it is another network than the config's.
    """
    own, found = model.state_dict(), checkpoint.weights
    captured = checkpoint.captured if config.model.module is not None else None
    check_fits(checkpoint, config, captured is None)
    if captured is not None:  # which says all
        where = first_difference(captured.graph, model.graph)
        if where is not None:
            raise CheckpointError(
                f"{checkpoint.path} holds another network than model.module makes: they differ first in "
                f"{where}"
            )
    kept = {name: one for name, one in own.items() if name.startswith((POLICY, MODULE + AUXILIARY))}
    aside = {MODULE + name: one for name, one in part_of(found, ASIDE).items() if MODULE + name in own}
    return kept | aside | {name: one for name, one in found.items() if name in own or name.startswith(MODULE)}


def check_fits(checkpoint: Checkpoint, config: Config, function: bool) -> None:
    """Compare a config with what the weights' shapes do not tell.

    Args:
        function: compare the settings that change what the network computes, too.

    Raises:
        CheckpointError: class count, mean or std, or a setting that changes the function is another.
    """
    path, own, asked = checkpoint.path, checkpoint.config.num_classes, num_classes(config)
    if checkpoint.origin.has_head and own != asked:
        raise CheckpointError(
            f"{path} has {own} classes, but {asked} are asked for (by model.num_classes or data.dataset "
            f"{config.data.dataset}); choose the dataset that the network was trained on"
        )
    wanted = function_of(config.model) if function else {}
    found = function_of(checkpoint.config) if function else {}
    if checkpoint.origin.normalisation:
        for key in ("mean", "std"):
            wanted[f"data.{key}"] = list(getattr(config.data, key))
            found[f"data.{key}"] = list(getattr(checkpoint, key))
    check_same(wanted, found, path)


def check_same(asked: Mapping[str, Any], own: Mapping[str, Any], path: str | Path) -> None:
    """Raises CheckpointError where `asked` differs from `own`, naming the key and the way to fix it."""
    for key, value in asked.items():
        if value != own[key]:
            text = "null" if own[key] is None else str(own[key]).replace(" ", "")
            raise CheckpointError(
                f"{path} does not fit the config: it was trained with {key} {own[key]}, not {value}; "
                f"train again or use --set {key}={text}"
            )


def function_of(model: ModelConfig) -> dict[str, Any]:
    """Settings that change what a network computes, by their full keys; classes are compared apart."""
    values = {f"model.{name}": attrgetter(name)(model) for name in function_keys(ModelConfig)}
    del values["model.num_classes"]
    return values if model.head in POOLING_HEADS else values | {"model.aspp_rates": None}
