"""A static network as one ONNX file of stock operators, with what a reader needs to know inside."""

from __future__ import annotations

import io
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.checkpoint import digest_of
from sparse_seg.errors import SparseSegError, first_line, import_package
from sparse_seg.export.check import check_onnx
from sparse_seg.export.options import ExportOptions
from sparse_seg.export.runtime import INSTALL
from sparse_seg.export.static import StaticNetwork
from sparse_seg.files import atomic_write
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.version import __version__

OPSET = 17  # tested with onnxruntime 1.20.1 (November 2024) to 1.32 and OpenVINO 2026.4
METADATA = "sparse_seg"


def export_onnx(
    model: SelectiveNetwork,
    path: str | Path,
    options: ExportOptions,
    names: Sequence[str] = (),
    colours: Sequence[Sequence[int]] = (),
    check: bool = True,
) -> dict[str, Any]:
    """Write a network for images of one size to `path`; see `StaticNetwork.forward` for inputs and outputs.

    Args:
        names, colours: of the classes, colours as RGB in 0..255; kept in the file. Without names, those of
            the model's card, if it has one.
        check: run the file in onnxruntime before it is written, see `check.check_onnx`.

    Returns:
        What is kept in the file's property `sparse_seg`.

    Raises:
        SparseSegError: options that do not fit, a missing package, or a check that fails.
        ValueError: an unknown merge.
        OSError: the file cannot be written; nothing is left of it.
    """
    network = StaticNetwork(model, options)
    graph, metadata = to_onnx(network), describe(model, network, names, colours)
    entry = graph.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(metadata)
    if check:
        check_onnx(graph.SerializeToString(), model, network)
    atomic_write(path, graph.SerializeToString())
    return metadata


def describe(
    model: SelectiveNetwork, network: StaticNetwork, names: Sequence[str], colours: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The file's metadata; with a digest of the weights, by which two files of one network know each
    other."""
    options, card = network.options, model.card
    if card is not None and not names:
        names, colours = card.names, card.colours
    mean, std = network.normalisation
    selective: dict[str, Any] = {"dense": options.dense}
    if options.dense is None:
        selective |= {
            "fine_fraction": network.ranking.fine / (network.blocks[0] * network.blocks[1]),
            "fine_blocks": network.ranking.fine,
            "middle_blocks": network.ranking.middle,
            "blocks": list(network.blocks),
            "policy": "given" if network.choice is None else network.choice.name,
            "exchange": network.exchange,
            "merge": network.merge,
        }
    return {
        "names": list(names) or [str(number) for number in range(network.classes)],
        "colours": [list(map(int, colour)) for colour in colours],
        "mean": list(mean),
        "std": list(std),
        "size": list(options.size),
        "frame": list(card.frame) if card and card.frame else None,
        "batch": options.batch,
        "input": options.input,
        "strides": list(network.strides),
        **selective,
        "version": __version__,
        "digest": digest_of(model.state_dict()),
    }


def to_onnx(network: StaticNetwork) -> Any:
    """The graph as an `onnx.ModelProto`.

    Raises:
        SparseSegError: onnx is not installed or broken, or PyTorch cannot export an operator.
    """
    onnx = import_package("onnx", f"export needs the package onnx: {INSTALL}", "load_from_string", "checker")
    graph = onnx.load_from_string(traced(network, network.example(), *network.interface()))
    graph.producer_name, graph.producer_version = "sparse_seg", __version__
    _name_nodes(graph)
    onnx.checker.check_model(graph)
    return graph


def traced(
    module: nn.Module, example: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str]
) -> bytes:
    """The ONNX file of a module for inputs like the example, as PyTorch's tracing exporter writes it.

    A fixed graph needs no more, and it takes an eighth of the time of the exporter on top of torch.export.
    (`torch.export.export` takes the static network as well, see tests/export.)

    Args:
        inputs, outputs: their names.

    Raises:
        SparseSegError: PyTorch cannot export an operator.
    """
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation, and fixed shapes, which are meant
        try:
            torch.onnx.export(
                module,
                example,
                buffer,  # type: ignore[arg-type]  # it may be a stream
                dynamo=False,
                opset_version=OPSET,
                do_constant_folding=False,  # runtimes do it when they load; here it would double the weights
                input_names=inputs,
                output_names=outputs,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise SparseSegError(f"PyTorch cannot export this network: {first_line(error)}") from error
    return buffer.getvalue()


def _name_nodes(graph: Any) -> None:
    """Name nodes after the layer that they belong to: `layer3.0.conv2/lattice`, `layer3.0.conv2/extra`.

    A layer is known by its weight; what prepares its input and nothing else carries its name, too.
    """
    weights = {one.name for one in graph.graph.initializer}
    makers = {output: node for node in graph.graph.node for output in node.output}
    named: dict[int, str] = {}

    def weight_of(value: str) -> str | None:
        while value in makers and makers[value].op_type in _FORM:
            value = makers[value].input[0]
        return value if value in weights and value.endswith(".weight") else None

    for node in graph.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul", "Mul") or len(node.input) < 2:
            continue
        weight = weight_of(node.input[1])
        if weight is None:
            continue
        layer = weight.removesuffix(".weight").removeprefix("weights.")
        part = "lattice" if node.op_type == "Conv" else "extra"
        named[id(node)] = f"{layer}/{part}"
        value = node.input[0]
        while value in makers and id(makers[value]) not in named and makers[value].op_type in _PREPARE:
            named[id(makers[value])] = f"{layer}/{part}/{makers[value].op_type.lower()}"
            value = makers[value].input[0]
    taken = Counter[str]()
    for node in graph.graph.node:
        name = named.get(id(node), node.name.strip("/") or node.op_type)
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}:{taken[name]}"


_FORM = ("Transpose", "Reshape", "Flatten", "Unsqueeze", "Squeeze", "Gather")  # of a weight
_PREPARE = ("Gather", "Reshape", "Concat")
