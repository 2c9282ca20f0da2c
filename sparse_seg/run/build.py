"""From config to network: one of ours, or any module that can be imported, captured."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_seg.config import RUN_SETTINGS, Config, ModelConfig, model_config
from sparse_seg.config.schema import STRIDES
from sparse_seg.errors import ConfigError, SparseSegError, did_you_mean, first_line
from sparse_seg.graph import capture
from sparse_seg.networks.encoder_decoder import build_module, captured_stride
from sparse_seg.ops import Graph
from sparse_seg.run.modes import eval_mode
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.selective import build_network, captured

CAPTURE_SIZE = (64, 128)  # px, of the example that a network of ours is captured with
MOST_GRAPHS = 64
_GRAPHS: dict[str, Graph] = {}  # by settings: a capture takes half a second


def build_model(config: str | Path | Mapping[str, Any] | Config | ModelConfig) -> SelectiveNetwork:
    """Build a network: of ours with fresh weights, or what `module` makes, with the weights that it has.

    Args:
        config: path of a YAML config, or a plain dict of model settings such as
            `{"backbone": "resnet50", "head": "lite", "num_classes": 19}` or
            `{"module": "my_package.nets:build", "module_args": {"classes": 19}}`, with defaults for the rest.

    Raises:
        ConfigError: unknown key, wrong type or impossible value, naming the key; a module that cannot be
            imported or made.
        NotSelective, UnknownOperator, CaptureFailed, GraphDiffers: see `selective`.
    """
    settings = model_config(config)
    if settings.module is not None:
        return capture_module(import_module(settings.module, settings.module_args), settings)
    settings, stride = with_strides(settings), captured_stride(settings)
    module: Any = build_module(settings, stride, stride)  # nothing but PyTorch's own upsampling
    module.to(memory_format=torch.channels_last)  # the layout of images; else each convolution converts
    return build_network(own_graph(settings, module), module, {}, settings)


def with_strides(settings: ModelConfig) -> ModelConfig:
    """Settings of a network of ours, with its strides. Raises a ConfigError for those that it has not."""
    if settings.own_strides not in STRIDES:
        choices = ", ".join(map(str, STRIDES))
        raise ConfigError(f"model.strides is {settings.own_strides}; a network of ours has one of {choices}")
    return dataclasses.replace(settings, strides=list(settings.own_strides))


def own_graph(settings: ModelConfig, module: nn.Module) -> Graph:
    """The graph of a network of ours, kept for the next one of the same settings.

    Args:
        module: at `captured_stride`, with PyTorch's own upsampling; it may be on the meta device.
    """
    runs = {name: getattr(ModelConfig(), name) for name in RUN_SETTINGS}
    key = repr(dataclasses.replace(settings, **runs | {"strides": [captured_stride(settings)]}))
    if key not in _GRAPHS:
        while len(_GRAPHS) >= MOST_GRAPHS:
            del _GRAPHS[next(iter(_GRAPHS))]
        with torch.device("cpu"), eval_mode(module):
            graph, _ = capture(module, CAPTURE_SIZE)
        _annotate(graph, module, settings.dilate_second)
        _GRAPHS[key] = graph
    return _GRAPHS[key]


def _annotate(graph: Graph, module: Any, dilate_second: bool) -> None:
    """What a graph at one output stride cannot tell: where a backbone's features end, and their natural
    strides; and which windows read the next cells at any stride."""
    for name, stride in module.backbone.stages.items():
        made = [node for node in graph.nodes if f"{node.layer}.".startswith(f"backbone.{name}.")]
        if not made:
            raise ConfigError(f"model.backbone: its stages name {name}, of which its features are not made")
        made[-1].options["natural"] = stride
    for node in graph.nodes if not dilate_second else ():
        if re.search(r"layer[34]\.\d+\.conv2$", node.layer):
            node.options["cell"] = True


def import_module(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """What `PACKAGE:CALLABLE` makes of arguments, on the CPU; packages in the working directory are found.

    Raises:
        ConfigError: it cannot be imported or called, or gives no `nn.Module`.
    """
    found = _imported(name)
    try:
        with torch.device("cpu"):
            module = found(**arguments)
    except SparseSegError:
        raise
    except Exception as error:  # whatever the package's own code raises, too
        raise ConfigError(f"{name} cannot be made with {dict(arguments)}: {_told(error)}") from None
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{name} gives a {type(module).__name__}, not an nn.Module")
    return module


def capture_module(module: nn.Module, settings: ModelConfig) -> SelectiveNetwork:
    """The network of what `import_module` made, as settings say; see `build_model`."""
    with torch.device("cpu"):  # the graph is compared with the module, by values
        network = captured(module, settings)
    found, asked = network.num_classes, settings.num_classes
    if asked is not None and found != asked:
        raise ConfigError(
            f"model.module {settings.module} gives {found} classes, but {asked} are asked for (by "
            "model.num_classes or the dataset); tell it by model.module_args, as num_classes"
        )
    return network


def _imported(name: str) -> Any:
    package, colon, path = name.partition(":")
    if not (package and colon and path):
        raise ConfigError(f"{name!r} must be PACKAGE:CALLABLE, as my_package.nets:build")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(package)
    except Exception as error:  # whatever the package's own code raises, too
        raise ConfigError(f"{name}: {package} cannot be imported ({_told(error)})") from None
    for part in path.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"{name}: {package} has no {path}{did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
