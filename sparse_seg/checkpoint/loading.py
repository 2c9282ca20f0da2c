"""Checkpoints to networks: which settings a config may change, and which weights are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparse_seg.checkpoint.captured import captured_network, missing_net
from sparse_seg.checkpoint.content import ASIDE, MODULE, POLICY, Checkpoint
from sparse_seg.checkpoint.file import load
from sparse_seg.config import (
    Config,
    MaskConfig,
    ModelConfig,
    check_model,
    function_keys,
    model_config,
    num_classes,
)
from sparse_seg.data import dataset_classes, dataset_ids
from sparse_seg.errors import CheckpointError, ConfigError
from sparse_seg.graph.file import first_difference
from sparse_seg.masks import cad_mask_net, mask_net
from sparse_seg.run.build import build_model
from sparse_seg.run.card import Card
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.weights import check_shapes, load_weights, meta_module, part_of
from sparse_seg.registry import POLICIES, POOLING_HEADS
from sparse_seg.run.network import SelectiveNetwork

NETS: dict[str, Callable[[int, int], nn.Module]] = {"mask_net": mask_net, "cad_mask_net": cad_mask_net}


def load_model(path: str | Path, config: Config | None = None) -> Any:  # of a Segmentor, as `build_model`
    """The network of a checkpoint, in eval mode: of training (averaged weights where it kept them) or
    converted.

    Args:
        config: how to run it: mask, engine, exchange, strides. For a network trained here the rest must say
            the same network as the file; of a converted one the file alone says what it is.

    Raises:
        CheckpointError: missing, damaged or foreign file, or one that does not fit the config.
        ConfigError: a learned mask's net that does not fit the strides.
    """
    return build_network(load(path), config)


def build_network(checkpoint: Checkpoint, config: Config | None = None) -> Any:
    """See `load_model`."""
    path = checkpoint.path
    if not checkpoint.origin.has_head:
        raise CheckpointError(
            f"{path} holds a backbone without a head; train one from it: --set model.pretrained={path}"
        )
    chosen, net = network_settings(checkpoint, config), _net(checkpoint)
    if checkpoint.captured is not None:
        return captured_network(checkpoint, chosen, net, read_card(checkpoint, config))
    masked = MaskConfig(policy=chosen.mask.policy if POLICIES[chosen.mask.policy].needs_net else "edge")
    try:
        planned = meta_network(dataclasses.replace(chosen, mask=masked), net).state_dict()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    check_shapes(planned, _weights_for(planned, checkpoint), path)
    model = build_model(chosen, net, read_card(checkpoint, config))
    load_weights(model, _weights_for(model.state_dict(), checkpoint), path)
    return model.eval()


def read_card(checkpoint: Checkpoint, config: Config | None = None) -> Card:
    """What a network's input and output mean: as the file says, else a config's data, else `Card.unnamed`."""
    count = checkpoint.config.num_classes or 0
    names, colours = checkpoint.classes, checkpoint.colours
    ids, unnamed = checkpoint.training.get("ids"), Card.unnamed(count)
    if config is not None and names is None:
        dataset, root = config.data.dataset, config.data.root
        known = dataset_classes(dataset, root)
        names, colours, ids = known.names, known.palette, dataset_ids(dataset, root)
    if not ids or len(ids) != count or not all(type(value) is int and 0 <= value <= 255 for value in ids):
        ids = unnamed.ids
    scaling = checkpoint if config is None else config.data
    return Card(names or unnamed.names, colours or unnamed.colours, tuple(ids), scaling.mean, scaling.std)


def _weights_for(own: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Weights to predict with. An auxiliary head, which only training uses, may be missing on either side; a
    learned mask is left out where another is asked for.

    Raises:
        CheckpointError: a learned mask is asked for, and there is none.
    """
    needed: tuple[str, ...] = ("backbone.", "head.")
    if any(name.startswith("policy.") for name in own):
        needed = ("backbone.", "head.", "policy.")
        if not part_of(checkpoint.weights, "policy."):
            raise CheckpointError(missing_net(checkpoint.path))
    auxiliary = {name: tensor for name, tensor in own.items() if name.startswith("auxiliary.")}
    found = checkpoint.weights.items()
    return auxiliary | {
        name: tensor for name, tensor in found if name.startswith(needed) or name in auxiliary
    }


def load_backbone(path: str | Path) -> SelectiveNetwork:
    """A network with the backbone of a checkpoint and a fresh head, in eval mode.

    Raises:
        CheckpointError: missing, damaged or foreign file.
    """
    checkpoint = load(path)
    model = build_model(checkpoint.config)
    load_weights(model.backbone, part_of(checkpoint.weights, "backbone."), path)
    return model.eval()


def network_settings(checkpoint: Checkpoint, config: Config | None = None) -> ModelConfig:
    """Settings of the network that `load_model` builds.

    Raises:
        CheckpointError: the config asks for another network than the file holds.
    """
    if config is None:
        return checkpoint.config
    check_fits(checkpoint, config)
    if checkpoint.origin.is_trained_here:
        result = model_config(config)
    else:
        own = {key: getattr(config.model, key) for key in RUN_SETTINGS}
        result = dataclasses.replace(checkpoint.config, **own)
    if checkpoint.captured is not None and result.strides is None:
        result = dataclasses.replace(result, strides=checkpoint.config.strides)
    check_model(result)
    return result


def initial_weights(checkpoint: Checkpoint, model: nn.Module, config: Config) -> dict[str, Tensor]:
    """Weights for training that starts from a checkpoint; a mask net and an auxiliary head stay as they are
    in `model` where the checkpoint has none.

    Raises:
        CheckpointError: it is another network than the config's.
    """
    check_fits(checkpoint, config, whole=True)
    own = model.state_dict()
    extra = (POLICY, "auxiliary.")
    kept = {name: tensor for name, tensor in own.items() if name.startswith(extra)}
    if isinstance(model, SelectiveNetwork) and checkpoint.captured is not None:
        return kept | _captured_weights(checkpoint, model)
    found = {
        name: tensor
        for name, tensor in checkpoint.weights.items()
        if name in own or name.startswith(("backbone.", "head."))
    }
    return kept | found


def _captured_weights(checkpoint: Checkpoint, model: SelectiveNetwork) -> dict[str, Tensor]:
    """A captured network's weights, by the names of a network whose module is there."""
    assert checkpoint.captured is not None
    where = first_difference(checkpoint.captured.graph, model.graph)
    if where is not None:
        raise CheckpointError(
            f"{checkpoint.path} holds another network than model.module makes: they differ first in {where}"
        )
    own, found = model.state_dict(), checkpoint.weights
    aside = {MODULE + name: tensor for name, tensor in part_of(found, ASIDE).items()}
    return {name: one for name, one in (aside | found).items() if name in own or name.startswith(MODULE)}


def check_fits(checkpoint: Checkpoint, config: Config, whole: bool = False) -> None:
    """Compare a config with what the weights' shapes do not tell.

    Args:
        whole: of a converted network, too, whose settings otherwise stand in its file.

    Raises:
        CheckpointError: class count, mean or std, or a setting that changes the function is another.
    """
    path, own, asked = checkpoint.path, checkpoint.config.num_classes, num_classes(config)
    if checkpoint.origin.has_head and own != asked:
        raise CheckpointError(
            f"{path} has {own} classes, but {asked} are asked for (by model.num_classes or data.dataset "
            f"{config.data.dataset}); choose the dataset that the network was trained on"
        )
    wanted, found = function_of(config.model), function_of(checkpoint.config)
    graphs = whole and checkpoint.captured is not None and config.model.module is not None
    if graphs or not (whole or checkpoint.origin.is_trained_here):  # of graphs, all is compared
        wanted, found = {}, {}
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


def _net(checkpoint: Checkpoint) -> Callable[[int, int], nn.Module]:
    name = checkpoint.origin.learned_net
    if name not in NETS:
        raise CheckpointError(f"{checkpoint.path} has a mask net {name!r} that this version does not know")
    return NETS[name]
