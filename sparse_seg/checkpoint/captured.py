"""Networks in files: their graph, and their tensors by the module's own names.

A file needs neither the package nor the code that defined the network: nothing is imported, and what the
graph says is checked before anything is built of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.checkpoint.content import (
    ASIDE,
    AUXILIARY,
    CONSTANTS,
    MODULE,
    POLICY,
    Captured,
    Checkpoint,
    Origin,
)
from sparse_seg.checkpoint.file import save
from sparse_seg.config import ModelConfig, check_model
from sparse_seg.errors import CheckpointError, ConfigError, SparseSegError, first_line
from sparse_seg.graph import Geometry
from sparse_seg.graph.file import check_tensors
from sparse_seg.masks import cad_mask_net, mask_net
from sparse_seg.ops import Graph
from sparse_seg.run.build import own_graph
from sparse_seg.run.card import Card
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.selective import build_network
from sparse_seg.run.values import Interpreter
from sparse_seg.run.weights import Tensors, check_finite, check_shapes, load_weights, meta_module, part_of
from sparse_seg.sites import Grid

NETS: dict[str, Callable[[int, int], nn.Module]] = {"mask_net": mask_net, "cad_mask_net": cad_mask_net}
MOST_PIXELS = 2**20  # of a graph that is checked on the CPU


def save_model(network: SelectiveNetwork, path: str | Path, card: Card | None = None) -> None:
    """Write a network as a checkpoint, which loads without the code that defined it.

    `sparse_seg.load_model(path)` and every command take the file.

    Args:
        network: what `selective`, `build_model` or `load_model` made.
        path: `.safetensors`; replaced if it is there.
        card: class names, colours, mean, std and size of the training frames; by default the network's own.

    Raises:
        CheckpointError: a network that is folded, or no network.
        OSError: the file cannot be written.
    """
    if not isinstance(network, SelectiveNetwork):
        raise CheckpointError(
            f"save_model writes what selective() made, not a {type(network).__name__}: make that of it first"
        )
    if network.is_folded:
        raise CheckpointError("a network made by for_inference() is not saved; save the one it was made of")
    save(dataclasses.replace(checkpoint_of(network, card or network.card), path=Path(path)))


def checkpoint_of(network: SelectiveNetwork, card: Card | None = None) -> Checkpoint:
    """A network as a checkpoint without a path; `card` says what is known of classes and input.

    Raises:
        CheckpointError: more or fewer class names than classes.
    """
    settings, count = network.settings, network.num_classes
    check_model(settings)
    weights, captured = content_of(network)
    entries = [
        [name, name.partition(".")[2], list(tensor.shape), None, 0]
        for name, tensor in weights.items()
        if name.startswith((MODULE, ASIDE))
    ]
    known, said = "", dict[str, Any]()
    if card is not None:
        if len(card.names) != count:
            raise CheckpointError(
                f"{len(card.names)} class names are given, and the network has {count} classes"
            )
        training = {"ids": list(card.ids)} | ({} if card.frame is None else {"frame": list(card.frame)})
        known, said = "as told", {"classes": card.names, "colours": card.colours, "training": training}
        said |= {"mean": tuple(card.mean), "std": tuple(card.std)}
    back = {"entries": entries, "aliases": {}}
    origin = Origin("module", settings.module or "", normalisation=known, back=back)
    return Checkpoint(Path(), weights, settings, origin=origin, captured=captured, **said)


def content_of(network: SelectiveNetwork) -> tuple[dict[str, Tensor], Captured]:
    """A network's tensors by a file's names, and its graph.

    What the graph does not name, as an auxiliary head, is kept for the way back to the module.
    """
    graph, tensors = network.graph, network.tensors
    named = graph.tensor_names
    own = {name: one for name, one in network.module.state_dict().items() if isinstance(one, Tensor)}
    weights = {(MODULE if name in named else ASIDE) + name: tensor for name, tensor in own.items()}
    weights |= {CONSTANTS + name: tensors[name].detach() for name in sorted(named - own.keys())}
    weights |= {POLICY + name: tensor for name, tensor in network.policy.state_dict().items()}
    return weights, _captured(graph, network.module)


def own_captured(settings: ModelConfig) -> Captured:
    """The graph of a network of ours, without memory for its tensors. Raises a ConfigError for impossible
    settings."""
    module = meta_module(settings)
    return _captured(own_graph(settings, module), module)


def _captured(graph: Graph, module: nn.Module) -> Captured:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return Captured(graph, frozenset(parameters) & graph.tensor_names)


def recaptured(checkpoint: Checkpoint, settings: ModelConfig) -> Checkpoint:
    """A checkpoint of ours with the graph that its settings make, not its file's.

    Raises:
        CheckpointError: its tensors are not those of the settings.
        ConfigError: impossible settings.
    """
    path, unused = checkpoint.path, MODULE + AUXILIARY  # which only training uses, may be missing or not
    weights = {name: one for name, one in checkpoint.weights.items() if not name.startswith(unused)}
    try:
        module = meta_module(dataclasses.replace(settings, auxiliary=False))
        check_shapes(module.state_dict(), part_of(weights, MODULE), path)
        captured = _captured(own_graph(settings, module), module)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return dataclasses.replace(checkpoint, weights=weights, captured=captured)


def captured_network(checkpoint: Checkpoint, settings: ModelConfig, card: Card) -> SelectiveNetwork:
    """The network of a file, in eval mode; `settings` say how it runs.

    Raises:
        CheckpointError: a graph that cannot be, or tensors that do not fit it.
        NotSelective: nothing of it can run selectively at these strides.
        ConfigError: impossible settings.
    """
    path, captured, net = checkpoint.path, checkpoint.captured, checkpoint.origin.learned_net
    assert captured is not None
    if net not in NETS:
        raise CheckpointError(f"{path} has a mask net {net!r} that this version does not know")
    own, constants = part_of(checkpoint.weights, MODULE), part_of(checkpoint.weights, CONSTANTS)
    if checkpoint.config.module is None:
        own = {name: _computed(one) for name, one in own.items()}
    try:
        _check(captured, own, constants, settings.strides)
        module = Tensors(own, captured.parameters)
        settings = dataclasses.replace(
            settings, module=checkpoint.config.module, module_args=checkpoint.config.module_args
        )
        network = build_network(captured.graph, module, constants, settings, card, NETS[net])
    except SparseSegError:
        raise
    except Exception as error:  # a graph that cannot be fails in many ways
        raise CheckpointError(f"{path} is damaged: its graph cannot be: {first_line(error)}") from None
    check_finite(own | constants, path)
    if network.policy.state_dict():
        found = part_of(checkpoint.weights, POLICY)
        if not found:
            raise CheckpointError(
                f"{path} holds no net of a mask: train one with train.init={path} (see "
                "configs/camvid_mask.yaml), fit one by sparse-seg fit-gain for policy gain, or choose "
                "another model.mask.policy"
            )
        load_weights(network.policy, found, path)
    return network.eval()


def _computed(tensor: Tensor) -> Tensor:
    """A tensor of ours as networks of ours have it: a source may store others, as half precision."""
    if tensor.is_floating_point():
        return tensor.to(torch.float32)
    return tensor if tensor.is_complex() or tensor.dtype == torch.bool else tensor.to(torch.int64)


def _check(
    captured: Captured,
    own: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    strides: Sequence[int] | None,
) -> None:
    """Run a graph on no images, which takes no memory, and compare all shapes with what it says.

    On the CPU: the first batch norm on the meta device imports a compiler, which takes 1.5 s. Only a graph
    of huge images, whose tables of upsampling take memory, runs there.

    Raises:
        ValueError: and many others, where it cannot be.
    """
    graph, both = captured.graph, own.keys() & constants.keys()
    if both or captured.parameters - own.keys():
        raise ValueError(f"{sorted(both | (captured.parameters - own.keys()))[:1]} is twice, or no parameter")
    device = "cpu" if math.prod(graph.size) <= MOST_PIXELS else "meta"
    tensors = {name: one.to(device) for name, one in {**own, **constants}.items()}
    check_tensors(graph, tensors)
    try:
        geometry = Geometry(graph, strides)
    except SparseSegError as error:
        raise ValueError(str(error)) from None
    dtype = next((one.dtype for one in tensors.values()), torch.float32)
    images = torch.empty(0, 3, *graph.size, dtype=dtype, device=device)
    with torch.no_grad():
        values = Interpreter(geometry, tensors, images).dense(geometry.own, geometry.nodes)
    for node in graph.nodes:
        value = values[node.name]
        shape = tuple((value.tensor if isinstance(value, Grid) else value).shape)
        if shape[1:-2] != node.shape[1:-2]:
            raise ValueError(f"{node.where} gives {list(shape)}, not {list(node.shape)}")
