"""A graph as JSON: plain data, of which nothing is run, checked in full before anything is built of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_seg.errors import CheckpointError, shown
from sparse_seg.ops import OPERATORS, Graph, Node
from sparse_seg.ops.norm import COUNT
from sparse_seg.ops.pointwise import BINARY

MOST_NODES, MOST_TEXT, MOST_AXES = 20_000, 500, 8
MOST_SIDE = 2**14  # px, of the images as captured
MOST_CHANNELS = 2**16  # of a value
MOST_TAPS, MOST_STEP, MOST_DILATION = 127, 64, 1024  # of a window along an axis
INPUTS = {
    **dict.fromkeys(("image", "zeros", "constant"), (0, 0)),
    **dict.fromkeys(BINARY, (1, 2)),
    "cat": (1, MOST_NODES),
}  # how many values an operator reads, where not one
NEVER = ("pad",)  # operators that stand in no finished graph
NODE, GRAPH = dataclasses.fields(Node), dataclasses.fields(Graph)
Test = Callable[[Any], bool]


def check_plain(graph: Graph) -> None:
    """Raises a CheckpointError, of one line, where a part of a graph runs by its own code."""
    if graph.own_code:
        raise CheckpointError(
            f"{graph.own_code[0]} runs by its own code, which no file of ours holds: keep the module's own "
            "file and call selective() anew, or export to ONNX"
        )


def to_json(graph: Graph) -> dict[str, Any]:
    """Plain values.

    Raises:
        CheckpointError: see `check_plain`.
    """
    check_plain(graph)
    return dataclasses.asdict(graph)


def from_json(tree: Any) -> Graph:
    """A graph from what a file says, which may be anything.

    Raises:
        ValueError: an entry that is missing, unknown or impossible, an unknown operator, or a value that is
            read before it is made.
    """
    found = _fields(tree, GRAPH, "the graph")
    entries, size = found["nodes"], found["size"]
    _require(isinstance(entries, list) and 1 < len(entries) <= MOST_NODES, "the graph has no list of nodes")
    _require(_numbers(64, MOST_SIDE, 2)(size), f"the graph's size is {shown(size)}")
    _require(all(side % 64 == 0 for side in size), f"the graph's size {size} is no multiple of 64")
    _require(isinstance(found["align_corners"], bool), "the graph's align_corners is not true or false")
    nodes = dict[str, Node]()
    for entry in entries:
        node = _node(entry, not nodes)
        _require(node.name not in nodes, f"{node.name} is made twice")
        for name in node.inputs:
            _require(name in nodes, f"{node.name} reads {name}, which is not made before")
        nodes[node.name] = node
    output = found["output"]
    _require(isinstance(output, str) and output in nodes, f"its output {shown(output)} is no value of it")
    last = nodes[output]
    _require(len(last.shape) == 4 and last.shape[1] > 1, f"its output {last.name} is {list(last.shape)}")
    return Graph(list(nodes.values()), output, (size[0], size[1]), found["align_corners"])


def check_tensors(graph: Graph, tensors: Mapping[str, Tensor]) -> None:
    """Compare a graph with the tensors that it names, which may be on the meta device.

    Raises:
        ValueError: a tensor that is missing, left over, no floating-point one, or does not fit its operator.
    """
    for node in graph.nodes:
        own = dict[str, Tensor]()
        for role, name in node.tensors.items():
            _require(name in tensors, f"{node.where}: the tensor {name} is missing")
            whole = role == COUNT  # of batches; all else is computed with
            fits = tensors[name].dtype == torch.int64 if whole else tensors[name].is_floating_point()
            kind = "int64" if whole else "floating-point"
            _require(fits, f"{node.where}: {name} has no {kind} numbers")
            own[role] = tensors[name]
        try:
            OPERATORS[node.op].check(node, own)
        except KeyError as error:
            raise ValueError(f"{node.where}: {error} is missing") from None
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{node.where}: {error}") from None
    left = sorted(tensors.keys() - graph.tensor_names)
    _require(not left, f"nothing of the graph reads its tensor {left[:1]}")


def first_difference(graph: Graph, other: Graph) -> str | None:
    """Where two graphs compute something else, for messages; None where they do not."""

    def computed(one: Graph) -> list[Any]:
        made = {node.name: place for place, node in enumerate(one.nodes)}
        return [
            (node.op, node.tensors, node.options, [made[name] for name in node.inputs])
            for node in one.nodes
            if node.op != "image"  # its option says how far the graph serves
        ]

    for node, ours, theirs in zip(graph.nodes[1:], computed(graph), computed(other), strict=False):
        if ours != theirs:
            return node.where
    return None if len(graph.nodes) == len(other.nodes) else "its length"


def _node(tree: Any, is_first: bool) -> Node:
    found = _fields(tree, NODE, "a node")
    name, op, inputs, options = (found[key] for key in ("name", "op", "inputs", "options"))
    _require(_is_text(name) and name != "", f"a node's name is {shown(name)}")
    known = isinstance(op, str) and op in OPERATORS and op not in NEVER
    _require(known, f"{name}: unknown operator {shown(op)}")
    _require((op == "image") == is_first, f"{name}: the image stands first, and only there")
    for key, test in FIELDS.items():
        _require(test(found[key]), f"{name}: its {key} is {shown(found[key])}")
    least, most = INPUTS.get(op, (1, 1))
    _require(_texts(inputs) and least <= len(inputs) <= most, f"{name}: {op} cannot read {shown(inputs)}")
    for key, value in options.items():
        _require(key in OPTIONS and OPTIONS[key](value), f"{name}: its option {shown(key)} is {shown(value)}")
    shape, tensors = tuple(found["shape"]), dict(found["tensors"])
    _require(math.prod(shape[1:-2]) <= MOST_CHANNELS, f"{name}: its shape {shape} has too many channels")
    node = Node(name, op, tuple(inputs), tensors, dict(options), shape, found["layer"])
    _check_padding(node)
    return node


def _check_padding(node: Node) -> None:
    """A window reads some place inside the image."""
    padding, options = node.options.get("padding", "same"), node.options
    if padding != "same" and "kernel" in options and "dilation" in options:
        sides = zip(padding, options["kernel"], options["dilation"], strict=True)
        fits = all(side <= (kernel - 1) * dilation for side, kernel, dilation in sides)
        _require(fits, f"{node.name}: its padding {padding} is wider than its window")


def _fields(tree: Any, fields: Any, what: str) -> Mapping[str, Any]:
    """A mapping with exactly these keys."""
    names = {one.name for one in fields}
    _require(isinstance(tree, Mapping), f"{what} is {shown(tree)}")
    wrong = sorted(set(tree) ^ names, key=str)
    _require(not wrong, f"{what} has {shown(wrong[:1])} missing or unknown")
    return tree


def _numbers(least: int, most: int, count: int | None = None) -> Test:
    """Whether a value is a list of whole numbers within bounds."""
    return lambda value: (
        isinstance(value, (list, tuple))
        and (len(value) <= MOST_AXES if count is None else len(value) == count)
        and all(type(number) is int and least <= number <= most for number in value)
    )


def _whole(value: Any) -> bool:
    return _numbers(0, MOST_CHANNELS)([value])


def _number(value: Any) -> bool:
    finite = type(value) in (int, float) and abs(value) <= 1e300
    return value is None or finite or value in (math.inf, -math.inf)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MOST_TEXT and value.isprintable()


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_text(one) for one in value)


FIELDS: dict[str, Test] = {  # of a node, beside its name, operator and inputs
    "layer": _is_text,
    "shape": lambda value: _numbers(1, MOST_CHANNELS)(value) and len(value) >= 4 and value[0] == 1,
    "tensors": lambda value: isinstance(value, Mapping) and _texts([*value, *value.values()]),
    "options": lambda value: isinstance(value, Mapping),
}
OPTIONS: dict[str, Test] = {
    "kernel": _numbers(1, MOST_TAPS, 2),
    "stride": _numbers(1, MOST_STEP, 2),
    "dilation": _numbers(1, MOST_DILATION, 2),
    "padding": lambda value: value == "same" or _numbers(0, MOST_TAPS * MOST_DILATION, 2)(value),
    "size": _numbers(1, MOST_SIDE, 2),
    "p": lambda value: _number(value) and value is not None and 0 <= value <= 1,
    **dict.fromkeys(("axes", "order"), _numbers(0, MOST_CHANNELS)),
    **dict.fromkeys(("groups", "start", "stop", "rank", "axis", "count", "natural", "multiple"), _whole),
    **dict.fromkeys(("frozen", "first", "whole", "keep", "cell"), _is_bool),
    **dict.fromkeys(("align_corners", "nearest", "count_outside"), _is_bool),
    **dict.fromkeys(("eps", "momentum", "number", "min", "max", "min_val", "max_val"), _number),
    **dict.fromkeys(("negative_slope", "alpha", "beta", "threshold"), _number),
    "approximate": lambda value: value in ("none", "tanh"),
}


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
