"""`selective`: any network from images to logits, run selectively from its graph alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparse_seg.config import MaskConfig, ModelConfig
from sparse_seg.errors import ConfigError, shown
from sparse_seg.graph import CaptureFailed, Geometry, capture
from sparse_seg.masks import POLICIES, build_policy, mask_net, parse_policy
from sparse_seg.ops import Graph, Node
from sparse_seg.run.card import Card
from sparse_seg.run.check import check_graph
from sparse_seg.run.modes import eval_mode
from sparse_seg.run.network import SelectiveNetwork

SIZE = (512, 1024)  # px, of the example image


def selective(
    module: nn.Module,
    strides: Sequence[int] | None = None,
    policy: str = "confidence",
    fine_fraction: float = 0.15,
    size: tuple[int, int] = SIZE,
    *,
    card: Card | None = None,
) -> SelectiveNetwork:
    """Run any segmentation network selectively: coarse everywhere, fine where a mask asks for it.

    The network is read as it runs on an image without values. Nothing is retrained and no tensor copied, so
    the module's state dict stays the checkpoint (`net.module` is the module). The result has the interface of
    `build_model`'s.

    Args:
        module: from normalised images `[B, 3, H, W]` to logits: a tensor, a dict with `out` or `logits`, or
            an output with `.logits`. A single logit is taken as two classes, split at 0; logits on a smaller
            grid are upsampled to the images' size.
        strides: px, finest first, each twice the one before, two or three. By default the output stride that
            the module itself has, and twice it: weights lose accuracy at a finer stride than they were
            trained at.
        policy: as `confidence` or `edge:cad`, see docs/masks.md.
        fine_fraction: share of blocks that become fine.
        size: `(H, W)` of an example image, px, multiples of 64; other sizes run as well. Where the module
            pads or crops at some, a warning says at which sizes results are its own.
        card: class names, colours, mean and std, where they are known.

    Raises:
        NotSelective: nothing of the network can run selectively; says why and what would change it.
        UnknownOperator: an operator that is not known; names it and the layer that it stands in.
        CaptureFailed: the module's code fails, or depends on the values of the images.
        GraphDiffers: the graph does not give the module's output on an example; names the first layer.
        ConfigError: an unknown policy, or impossible settings.
        TrainingError: the module is in training mode and computes weights of parameters, as weight norm does.
    """
    mask = parse_policy(policy, dataclasses.replace(MaskConfig(), fine_fraction=fine_fraction))
    chosen = None if strides is None else list(check_strides(strides))
    return captured(
        module, ModelConfig(module=type(module).__qualname__, strides=chosen, mask=mask), size, card
    )


def captured(
    module: nn.Module, settings: ModelConfig, size: tuple[int, int] = SIZE, card: Card | None = None
) -> SelectiveNetwork:
    """See `selective`."""
    module = _unwrapped(module)
    sides = list(size) if isinstance(size, Sequence) else []
    if len(sides) != 2 or not all(isinstance(one, Integral) and one >= 64 and one % 64 == 0 for one in sides):
        raise ConfigError(f"size must be (H, W), multiples of 64 px, not {shown(size)}")
    with eval_mode(module):
        graph, constants = capture(module, (size[0], size[1]))
        logits = graph.node(graph.output)
        if logits.op in ("sigmoid", "softmax", "log_softmax"):
            raise CaptureFailed(
                f"{logits.where}: the network ends in a {logits.op}; give its logits, without it"
            )
        if logits.shape[1] == 1:
            graph = _two_classes(graph)
        network = build_network(graph, module, constants, settings, card)
        check_graph(network, module, size)
    if module.training:
        network.check_trains()
    network.training = module.training  # alone: parts of the module may be frozen
    network.policy.train(module.training)
    return network


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network inside what DataParallel and torch.compile add."""
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"selective() takes a torch.nn.Module, not {type(module).__name__}; files of weights are for "
            "sparse-seg convert"
        )
    if isinstance(module, SelectiveNetwork):
        raise ConfigError("this network runs selectively already: give selective() the module it was made of")
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(module.module)
    original = getattr(module, "_orig_mod", None)
    if isinstance(original, nn.Module):
        return _unwrapped(original)
    tensors = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
    if any(map(is_lazy, tensors.values())):
        raise ConfigError(
            f"{type(module).__name__} has lazy layers without weights: run it on an image, or load them"
        )
    for name, one in tensors.items():
        if one.is_meta:
            raise ConfigError(f"{name} is on the meta device and has no values: load the weights first")
        kind = type(one)  # subclasses of tensors, but for parameters, make all that is computed one of theirs
        if kind is not Tensor and kind.__torch_function__ is not nn.Parameter.__torch_function__:
            raise ConfigError(
                f"{name} is a {kind.__name__}: make it a plain tensor, by .as_subclass(torch.Tensor)"
            )
    return module


def build_network(
    graph: Graph,
    module: nn.Module,
    constants: Mapping[str, Tensor],
    settings: ModelConfig,
    card: Card | None = None,
    learned_net: Any = mask_net,
) -> SelectiveNetwork:
    """A network of a graph and its tensors.

    Args:
        learned_net: makes the net of a policy that is trained, of the channels that it reads and of how many
            cells a block is wide.

    Raises:
        NotSelective: nothing of it can run selectively at these strides.
        ConfigError: impossible settings.
    """
    geometry = Geometry(graph, None if settings.strides is None else check_strides(settings.strides))
    chosen, mask = geometry.strides, settings.mask
    features = graph.node(geometry.features).shape[1]
    classes = graph.node(graph.output).shape[1]
    net = POLICIES[mask.policy].make_net(features, chosen[-1] // chosen[0], classes, learned_net)
    try:
        policy = build_policy(mask, chosen, net)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    for layer in policy.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eps = settings.bn_eps
    reference = next(module.parameters(), torch.zeros(1))
    settings = dataclasses.replace(settings, strides=list(chosen))
    return SelectiveNetwork(graph, module, constants, policy.to(reference.device), settings, card)


def check_strides(strides: Sequence[int]) -> tuple[int, ...]:
    """Raises a ConfigError for strides that no mask chooses between."""
    try:
        chosen = () if isinstance(strides, str) else tuple(map(int, strides))
    except (TypeError, ValueError):
        chosen = ()
    doubles = all(2 * a == b for a, b in itertools.pairwise(chosen))
    if len(chosen) not in (2, 3) or not doubles or chosen[0] < 2 or chosen[0] & (chosen[0] - 1):
        raise ConfigError(
            "strides must be two or three, finest first, each twice the one before, as (8, 16) or "
            f"(8, 16, 32), not {shown(strides)}"
        )
    return chosen


def _two_classes(graph: Graph) -> Graph:
    """A graph of one logit as one of two classes: 0, and the logit."""
    logit = graph.node(graph.output)
    zero = Node(f"{logit.name}.zero", "mul", (logit.name,), {}, {"number": 0.0}, logit.shape)
    shape = (logit.shape[0], 2, *logit.shape[2:])
    both = Node(f"{logit.name}.both", "cat", (zero.name, logit.name), {}, {}, shape)
    return dataclasses.replace(graph, nodes=[*graph.nodes, zero, both], output=both.name)
