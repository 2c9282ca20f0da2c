"""Write a network as one ONNX file, checked before it is there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_seg.export.check import check_graph
from sparse_seg.export.onnx_file import METADATA, describe, to_onnx
from sparse_seg.export.options import ExportOptions
from sparse_seg.export.static import StaticNetwork
from sparse_seg.files import atomic_write
from sparse_seg.run.network import SelectiveNetwork


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
        names, colours: of the classes, colours as RGB in 0..255; kept in the file.
        check: run the file in onnxruntime before it is written, see `check.check_graph`.

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
        check_graph(graph.SerializeToString(), model, network)
    atomic_write(path, graph.SerializeToString())
    return metadata
