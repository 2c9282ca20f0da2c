"""Captured networks in files: their graph, and their tensors by the module's own names.

A file needs neither the package nor the code that defined the network: nothing is imported, and what the
graph says is checked before anything is built of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_seg.checkpoint.content import (
    ASIDE,
    CONSTANTS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MODULE,
    POLICY,
    Captured,
    Checkpoint,
    Origin,
)
from sparse_seg.checkpoint.file import save
from sparse_seg.config import ModelConfig, check_model
from sparse_seg.errors import CheckpointError, SparseSegError
from sparse_seg.graph import Geometry
from sparse_seg.graph.file import check_tensors
from sparse_seg.models.base import Segmentor
from sparse_seg.models.card import Card
from sparse_seg.models.weights import check_finite, load_weights, part_of
from sparse_seg.run.build import check_policy
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.segmentor import Tensors
from sparse_seg.run.selective import build_network
from sparse_seg.run.values import Run
from sparse_seg.sites import Grid


def save_model(network: SelectiveNetwork, path: str | Path, card: Card | None = None) -> None:
    """Write a captured network as a checkpoint, which loads without the code that defined it.

    `sparse_seg.load_model(path)` and every command take the file.

    Args:
        network: what `selective` made.
        path: `.safetensors`; replaced if it is there.
        card: class names, colours, mean and std; by default the network's own.

    Raises:
        CheckpointError: a network that is folded, or none that was captured.
        OSError: the file cannot be written.
    """
    if not isinstance(network, SelectiveNetwork):
        raise CheckpointError(
            f"save_model writes what selective() made, not a {type(network).__name__}, which training writes"
        )
    if network.is_folded:
        raise CheckpointError("a network made by for_inference() is not saved; save the one it was made of")
    card = card or network.card
    if card is None:
        write_network(network, path)
    else:
        told = card.names, card.colours, card.ids
        write_network(network, path, *told, card.mean, card.std, "as told")


def write_network(
    network: SelectiveNetwork,
    path: str | Path,
    names: Sequence[str] | None = None,
    colours: Sequence[tuple[int, int, int]] | None = None,
    ids: Sequence[int] | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    normalisation: str = "",
) -> None:
    """See `save_model`; of the classes and the input, what is known (see `Checkpoint` and `Origin`)."""
    settings, count = network.settings, network.num_classes
    check_model(settings)
    if names is not None and len(names) != count:
        raise CheckpointError(f"{len(names)} class names are given, and the network has {count} classes")
    weights, captured = content_of(network)
    save(
        Checkpoint(
            Path(path),
            weights,
            settings,
            None if names is None else tuple(names),
            None if colours is None else tuple(colours),
            tuple(mean),
            tuple(std),
            origin_of(settings, weights, normalisation),
            {} if ids is None else {"ids": list(ids)},
            captured=captured,
        )
    )


def origin_of(settings: ModelConfig, weights: Mapping[str, Tensor], normalisation: str) -> Origin:
    """The origin of a module's weights, with the way back to its state dict."""
    entries = [
        [name, name.partition(".")[2], list(tensor.shape), False, None, 0]
        for name, tensor in weights.items()
        if name.startswith((MODULE, ASIDE))
    ]
    back = {"entries": entries, "aliases": {}}
    return Origin("module", settings.module or "", normalisation=normalisation, back=back)


def parts_of(model: Segmentor) -> tuple[dict[str, Tensor], Captured | None]:
    """Weights by a file's names, and the graph of a captured network."""
    return content_of(model) if isinstance(model, SelectiveNetwork) else (model.state_dict(), None)


def content_of(network: SelectiveNetwork) -> tuple[dict[str, Tensor], Captured]:
    """A network's tensors by a file's names, and its graph.

    What the graph does not name, as an auxiliary head, is kept for the way back to the module.
    """
    graph, tensors = network.graph, network.tensors
    named = {name for node in graph.nodes for name in node.tensors.values()}
    own = {name: one for name, one in network.module.state_dict().items() if isinstance(one, Tensor)}
    weights = {(MODULE if name in named else ASIDE) + name: tensor for name, tensor in own.items()}
    weights |= {CONSTANTS + name: tensors[name].detach() for name in sorted(named - own.keys())}
    weights |= {POLICY + name: tensor for name, tensor in network.policy.state_dict().items()}
    parameters = dict(network.module.named_parameters(remove_duplicate=False))
    return weights, Captured(graph, frozenset(parameters) & named)


def captured_network(
    checkpoint: Checkpoint,
    settings: ModelConfig,
    net: Callable[[int, int], nn.Module],
    card: Card,
) -> SelectiveNetwork:
    """The network of a file, in eval mode; `settings` say how it runs, `net` makes a learned policy's.

    Raises:
        CheckpointError: a graph that cannot be, or tensors that do not fit it.
        NotSelective: nothing of it can run selectively at these strides.
        ConfigError: impossible settings.
    """
    path, captured = checkpoint.path, checkpoint.captured
    assert captured is not None
    own, constants = part_of(checkpoint.weights, MODULE), part_of(checkpoint.weights, CONSTANTS)
    try:
        _check(captured, own, constants)
        module = Tensors(own, captured.parameters)
        network = build_network(
            captured.graph,
            module,
            constants,
            settings.strides,
            settings.mask,
            settings.exchange,
            card,
            net,
            settings.merge,
            settings.engine,
        )
        check_policy(network)
    except SparseSegError:
        raise
    except Exception as error:  # a graph that cannot be fails in many ways
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path} is damaged: its graph cannot be: {first}") from None
    network.name, network.arguments = checkpoint.config.module or "", checkpoint.config.module_args
    check_finite(own | constants, path)
    if network.policy.state_dict():
        found = part_of(checkpoint.weights, POLICY)
        if not found:
            raise CheckpointError(missing_net(path))
        load_weights(network.policy, found, path)
    return network.eval()


def missing_net(path: Path) -> str:
    """The message where a policy needs a net that a file has not."""
    return (
        f"{path} holds no net of a mask: train one with train.init={path} (see configs/camvid_mask.yaml), "
        "fit one by sparse-seg fit-gain for policy gain, or choose another model.mask.policy"
    )


def _check(captured: Captured, own: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> None:
    """Run a graph on the meta device, which takes no memory, and compare all shapes with what it says.

    Raises:
        ValueError: and many others, where it cannot be.
    """
    graph, both = captured.graph, own.keys() & constants.keys()
    if both or captured.parameters - own.keys():
        raise ValueError(f"{sorted(both | (captured.parameters - own.keys()))[:1]} is twice, or no parameter")
    tensors = {name: torch.empty_like(one, device="meta") for name, one in {**own, **constants}.items()}
    check_tensors(graph, tensors)
    try:
        geometry = Geometry(graph)
    except SparseSegError as error:
        raise ValueError(str(error)) from None
    dtype = next((one.dtype for one in tensors.values()), torch.float32)
    images = torch.empty(1, 3, *graph.size, dtype=dtype, device="meta")
    with torch.no_grad():
        values = Run(geometry, tensors, images).dense(geometry.own, geometry.nodes)
    for node in graph.nodes:
        value = values[node.name]
        shape = tuple((value.tensor if isinstance(value, Grid) else value).shape)
        if shape[1:-2] != node.shape[1:-2]:
            raise ValueError(f"{node.where} gives {list(shape)}, not {list(node.shape)}")
