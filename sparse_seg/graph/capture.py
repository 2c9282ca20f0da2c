"""A module's graph, in eval mode: operators with the module's own tensors, by name."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_seg.errors import first_line
from sparse_seg.graph.reading import CaptureFailed, Reader
from sparse_seg.graph.rewrite import fold_pads
from sparse_seg.ops import OPERATORS, Graph, Node, UnknownOperator
from sparse_seg.ops.own_code import Part, able_parts

_TORCH, _OURS = Path(torch.__file__).parent, Path(__file__).parents[1]
KEYS = ("out", "logits")  # of what networks return


def logits_of(output: Any) -> Tensor:
    """The logits in what a segmentation network returns: a tensor, torchvision's dict, Hugging Face's output,
    or the first of several tensors.

    Raises:
        CaptureFailed: none of these.
    """
    if isinstance(output, Tensor):
        return output
    for key in KEYS:
        if isinstance(output, Mapping) and key in output:
            return output[key]
        if isinstance(getattr(output, key, None), Tensor):
            return getattr(output, key)
    if isinstance(output, Sequence) and output and isinstance(output[0], Tensor):
        return output[0]
    raise CaptureFailed(
        f"the module returns a {type(output).__name__}; it must return logits, or a dict with 'out' or "
        "'logits': wrap it in a module that does"
    )


def capture(module: nn.Module, size: tuple[int, int]) -> tuple[Graph, dict[str, Tensor]]:
    """The graph of a module from normalised images to logits, and the constant tensors that it has beside its
    state dict.

    Args:
        module: in eval mode.
        size: `(H, W)` of the images to capture it with, px; the graph serves others, too.

    Raises:
        CaptureFailed: the module's code fails, or reads values of the image, or does not return logits.
        UnknownOperator: names the operator and the layer that it stands in.
    """
    graph, constants = _captured(module, size)
    if any(node.op == "pad" for node in graph.nodes):
        try:
            other, _ = _captured(module, (size[0] + 1, size[1] + 1))  # odd at every stride
        except (CaptureFailed, UnknownOperator):
            pass  # a module of even sizes alone
        else:
            _find_same(graph, other)
    return fold_pads(graph), constants


def _find_same(graph: Graph, other: Graph) -> None:
    """Mark padding by TensorFlow's SAME rule, which is another where lengths are odd, as in the other graph.

    Where a layer has it in that graph alone, its window takes it.
    """
    ours, theirs = _with_first_input(graph), _with_first_input(other)
    if [node.op for node, _ in ours] != [node.op for node, _ in theirs]:
        return
    for (node, before), (_, again) in zip(ours, theirs, strict=True):
        alike = before.options.get("pads") == again.options.get("pads")
        if alike or OPERATORS[node.op].window(node) is None:
            continue
        if before.op == "pad":
            before.options["pads"] = "same"
        elif node.options["padding"] == [0, 0]:
            node.options["padding"] = "same"


def _with_first_input(graph: Graph) -> list[tuple[Node, Node]]:
    """Each node but paddings, and what makes the first value that it reads."""
    made = graph.by_name
    return [(node, made[(*node.inputs, node.name)[0]]) for node in graph.nodes if node.op != "pad"]


def _captured(module: nn.Module, size: tuple[int, int]) -> tuple[Graph, dict[str, Tensor]]:
    """Parts with operators that are unknown run by their own code, where they can."""
    able: dict[str, Part] | None = None
    parts: dict[str, Part] = {}
    while True:
        try:
            return _read(module, size, parts)
        except UnknownOperator as error:
            if able is None:
                try:
                    tensor = next(iter(module.parameters()), torch.zeros(1))
                    able = able_parts(module, tensor.new_zeros(1, 3, *size))
                except Exception:  # of the module's own code: it may trace and not run
                    raise error from None
            names = {name for layer in error.layers if (name := _able_part(layer, able, parts)) is not None}
            if not names:
                raise
            parts |= {name: able[name] for name in names}
            parts = {one: part for one, part in parts.items() if not _is_inside(one, parts)}


def _able_part(layer: str, able: Mapping[str, Part], parts: Mapping[str, Part]) -> str | None:
    """The smallest part around a layer that is able to, and no part yet."""
    around = (layer.rsplit(".", above)[0] for above in range(layer.count(".") + 1))
    return next((one for one in around if one in able and one not in parts), None)


def _is_inside(name: str, parts: Mapping[str, Part]) -> bool:
    """Whether a part lies in another one."""
    return any(name.startswith(f"{one}.") for one in parts)


def _read(
    module: nn.Module, size: tuple[int, int], parts: Mapping[str, Part]
) -> tuple[Graph, dict[str, Tensor]]:
    reader = Reader(module, parts.values())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = reader.read(size)
    except Exception as error:  # whatever the module's own code raises
        raise CaptureFailed(
            f"cannot trace {type(module).__name__} at {size[0]}x{size[1]}: {first_line(error)}"
            f"{_place(error) or (f' ({reader.failed})' if reader.failed else '')}"
        ) from error
    graph = reader.graph(logits_of(output), size)
    used = graph.tensor_names
    return graph, {name: tensor for name, tensor in reader.record.constants.items() if name in used}


def _place(error: Exception) -> str:
    """The line of the module's code that raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not Path(frame.filename).is_relative_to(_TORCH)]
    own = [frame for frame in own if not Path(frame.filename).is_relative_to(_OURS)]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno}: {own[-1].line})" if own else ""
