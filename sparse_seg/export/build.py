"""The static form of a network, whichever kind it is of."""

from __future__ import annotations

from typing import Any

from sparse_seg.export import graph_network, network
from sparse_seg.export.static import ExportOptions, StaticForm
from sparse_seg.run.segmentor import Segmentor
from sparse_seg.run.network import SelectiveNetwork


def static_form(model: Segmentor, options: ExportOptions) -> StaticForm:
    """Copies of a model's weights for images of one size.

    Args:
        model: in eval mode; stays as it is.

    Raises:
        SparseSegError: options that do not fit the model, or a part that has no static form.
    """
    known: Any = model
    if isinstance(model, SelectiveNetwork):
        return graph_network.GraphNetwork(known, options)
    return network.StaticNetwork(known, options)


def check_options(model: Segmentor, options: ExportOptions) -> None:
    """Raises a SparseSegError, of one line, where a model has no static form with these options."""
    known: Any = model
    (graph_network if isinstance(model, SelectiveNetwork) else network).check_options(known, options)
