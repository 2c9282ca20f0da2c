"""Rewrites of a graph: each rule replaces a node by something that gives the same values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparse_seg.ops import OPERATORS, Graph, Node, UnknownOperator
from sparse_seg.ops.convolution import kernel_of

Tensors = dict[str, Tensor]
IGNORES = {"conv2d": 0.0, "max_pool2d": -math.inf, "avg_pool2d": 0.0}  # values that stand for no padding


class _State:
    """A graph while it is rewritten."""

    def __init__(self, graph: Graph, tensors: Tensors) -> None:
        self.graph, self.tensors = graph, tensors

    def apply(self, rule: Rule) -> None:
        self.users, self.by_name = self.graph.users(), self.graph.by_name
        names: dict[str, str] = {}  # of values that others stand for now
        nodes: list[Node] = []
        for old in self.graph.nodes:
            node = replace(old, inputs=tuple(names.get(name, name) for name in old.inputs))
            made = rule(node, self)
            made = [node] if made is None else made
            names[node.name] = made[-1].name if made else node.inputs[0]
            self.by_name.update((one.name, one) for one in made)
            nodes += made
        self.graph = replace(self.graph, nodes=nodes, output=names[self.graph.output]).pruned()

    def of(self, node: Node) -> Tensors:
        return {role: self.tensors[name] for role, name in node.tensors.items()}

    def has_one_user(self, name: str) -> bool:
        return len(self.users.get(name, ())) == 1 and name != self.graph.output

    def keep(self, name: str, tensor: Tensor) -> str:
        """Enter a tensor that the network has not."""
        self.tensors[name] = tensor.detach()
        return name


# Gives what stands in a node's place, the last of it makes its value. None: the node stays. An empty list:
# its first input stands for it
Rule = Callable[[Node, _State], list[Node] | None]


# -- padding -----------------------------------------------------------------------------------------------


def fold_pads(graph: Graph) -> Graph:
    """Give padding layers to the windows that read them, through what treats each place by itself.

    Where something but zero then stands outside the image (a norm's shift), a convolution reads what its
    input has above that, and adds what the outside alone gives.

    Raises:
        UnknownOperator: padding that no window reads.
    """
    state = _State(graph, {})
    for rule in (_outside, _push_pad):
        state.apply(rule)
    for node in state.graph.nodes:
        if node.op == "pad":
            raise UnknownOperator(f"{node.layer or 'the network'}: padding that no window reads")
    return state.graph


def _outside(node: Node, state: _State) -> list[Node] | None:
    """A pad reads the vector that stands outside, too."""
    if node.op != "pad":
        return None
    shape, value = (1, node.shape[1], 1, 1), node.options["value"]
    made = [Node(f"{node.name}.outside", "zeros", shape=shape, layer=node.layer)]
    if value != 0:
        zeros, number = (made[0].name,), {"number": value}
        made.append(Node(f"{node.name}.value", "add", zeros, {}, number, shape, node.layer))
    return [*made, replace(node, inputs=(*node.inputs, made[-1].name))]


def _push_pad(node: Node, state: _State) -> list[Node] | None:
    """A window takes the pad that it reads; what treats each place by itself comes before it.

    The pad of such a value has no `value` of its own: outside stands what its second input is.
    """
    pad = next((one for name in node.inputs if (one := state.by_name[name]).op == "pad"), None)
    if pad is None:
        return None
    operator, window, (source, outside) = OPERATORS[node.op], OPERATORS[node.op].window(node), pad.inputs
    if window is not None and window.kernel != (1, 1):
        return _padded(replace(node, inputs=(source,)), pad, state.by_name[outside])
    if len(node.inputs) != 1 or operator.is_pool or operator.needs_grid:
        raise UnknownOperator(f"{pad.layer or 'the network'}: padding is read by {node.where}")
    if window is not None and window.stride != (1, 1):
        raise UnknownOperator(f"{node.layer}: padding is read by a strided 1x1 convolution")
    shape, options = node.shape[:-2], dict(node.options)
    around = replace(node, name=f"{node.name}.outside", inputs=(outside,), shape=(*shape, 1, 1))
    around.options = options | ({"frozen": True} if node.op == "batch_norm" else {})
    inside = replace(node, inputs=(source,), shape=(*shape, *state.by_name[source].size))
    both, unlike = (inside.name, around.name), pad.options | {"value": None}
    pushed = replace(pad, name=f"{node.name}.pad", inputs=both, options=unlike, shape=node.shape)
    return [around, inside, pushed]


def _padded(user: Node, pad: Node, outside: Node) -> list[Node]:
    """What gives a window's value without the pad."""
    value, options = pad.options["value"], dict(user.options)
    if pad.options["pads"] == "same":
        if options["padding"] != [0, 0]:
            raise UnknownOperator(f"{user.where}: padded twice")
        options["padding"] = "same"
    else:
        left, _, above, _ = pad.options["pads"]
        options["padding"] = [options["padding"][0] + above, options["padding"][1] + left]
    if value is not None and IGNORES.get(user.op) == value:
        options |= {"count_outside": True} if user.op == "avg_pool2d" else {}
        return [replace(user, options=options)]
    if value is not None or user.op != "conv2d":
        what = "what layers give there" if value is None else value
        raise UnknownOperator(f"{user.where}: reads padding of {what}")
    (name,) = user.inputs
    shape = (*outside.shape[:-2], *user.size)
    shifted = Node(f"{user.name}.above", "sub", (name, outside.name), {}, {}, shape, user.layer)
    conv = replace(user, name=f"{user.name}.conv", inputs=(shifted.name,), options=options)
    constant = Node(
        f"{user.name}.outside", "conv2d_of_constant", (outside.name,), {"weight": user.tensors["weight"]},
        {"groups": user.options["groups"]}, (*user.shape[:-2], 1, 1), user.layer,
    )  # fmt: skip
    total = Node(user.name, "add", (conv.name, constant.name), {}, {}, user.shape, user.layer)
    return [shifted, conv, constant, total]


# -- for prediction ----------------------------------------------------------------------------------------


def fold_norms(graph: Graph, tensors: Mapping[str, Tensor]) -> tuple[Graph, Tensors]:
    """The graph for prediction alone: no dropout, constants computed, batch norms within convolutions, and a
    1x1 convolution of joined vectors and grids taken apart.

    Returns:
        The graph and all tensors that it needs; those it shares with `tensors` are the same.
    """
    state = _State(graph, dict(tensors))
    for rule in RULES:
        state.apply(rule)
    return state.graph, {name: state.tensors[name] for name in state.graph.tensor_names}


def _drop_dropout(node: Node, state: _State) -> list[Node] | None:
    return [] if node.op == "dropout" else None


def _compute_constants(node: Node, state: _State) -> list[Node] | None:
    """What depends on no image becomes a tensor, given to who reads it as a constant."""
    if node.op == "zeros":
        state.keep(f"{node.name}.value", torch.zeros(node.shape, dtype=_dtype(state)))
        return [replace(node, op="constant", tensors={"value": f"{node.name}.value"})]
    inputs = [state.by_name[name] for name in node.inputs]
    if not inputs or any(one.op != "constant" for one in inputs):
        if node.op in ("sub", "add") and len(inputs) == 2 and inputs[1].op == "constant":
            options = {"axes": list(inputs[1].shape[1:-2])}
            tensors = {"tensor": inputs[1].tensors["value"]}
            return [replace(node, inputs=node.inputs[:1], tensors=tensors, options=options)]
        return None
    values = [state.tensors[one.tensors["value"]] for one in inputs]
    value = OPERATORS[node.op].apply(node, state.of(node), values, False)
    name = state.keep(f"{node.name}.value", value)
    return [replace(node, op="constant", inputs=(), tensors={"value": name}, options={})]


def _dtype(state: _State) -> torch.dtype:
    return next((t.dtype for t in state.tensors.values() if t.is_floating_point()), torch.float32)


def _fold_shift(node: Node, state: _State) -> list[Node] | None:
    """A constant for each channel behind a convolution is part of its bias."""
    if node.op != "add" or "tensor" not in node.tensors or node.options.get("first"):
        return None
    conv = state.by_name[node.inputs[0]]
    shift = state.tensors[node.tensors["tensor"]].flatten()
    if conv.op != "conv2d" or not state.has_one_user(conv.name) or shift.shape != (node.shape[1],):
        return None
    own = state.of(conv)
    bias = shift if "bias" not in own else own["bias"] + shift
    return [_conv(conv, node, state, own["weight"], bias)]


def _fold_batch_norm(node: Node, state: _State) -> list[Node] | None:
    """A batch norm behind a convolution that nothing else reads is part of its weight and bias."""
    if node.op != "batch_norm":
        return None
    conv = state.by_name[node.inputs[0]]
    if conv.op != "conv2d" or not state.has_one_user(conv.name):
        return None
    norm, own = state.of(node), state.of(conv)
    scale = torch.rsqrt(norm["running_var"] + node.options["eps"])
    scale = scale if "weight" not in norm else scale * norm["weight"]
    bias = -norm["running_mean"] * scale
    bias = bias if "bias" not in norm else bias + norm["bias"]
    bias = bias if "bias" not in own else bias + own["bias"] * scale
    weight = kernel_of(own["weight"])
    return [_conv(conv, node, state, weight * scale[:, None, None, None], bias)]


def _conv(conv: Node, behind: Node, state: _State, weight: Tensor, bias: Tensor) -> Node:
    """A convolution with another weight and bias, in the place of what stood behind it."""
    tensors = {
        "weight": state.keep(f"{behind.name}.weight", weight),
        "bias": state.keep(f"{behind.name}.bias", bias),
    }
    return replace(conv, name=behind.name, tensors=tensors)


def _part_joined(node: Node, state: _State) -> list[Node] | None:
    """A 1x1 convolution of joined values, of which some are vectors: a convolution of each kind, added.

    A vector is then not repeated at every place.
    """
    if node.op != "conv2d" or node.options["groups"] != 1 or node.options["kernel"] != [1, 1]:
        return None
    joined = state.by_name[node.inputs[0]]
    if joined.op != "cat" or not state.has_one_user(joined.name) or node.options["stride"] != [1, 1]:
        return None
    parts = [state.by_name[name] for name in joined.inputs]
    vectors = [part.size == (1, 1) for part in parts]
    if not any(vectors) or all(vectors):
        return None
    weight = kernel_of(state.of(node)["weight"])
    columns = weight.split([part.shape[1] for part in parts], 1)
    made: list[Node] = []
    for suffix, is_vector in (("grid", False), ("vector", True)):
        name, chosen = (
            f"{node.name}.{suffix}",
            [place for place, one in enumerate(vectors) if one == is_vector],
        )
        own, inputs = torch.cat([columns[place] for place in chosen], 1), [parts[place] for place in chosen]
        if len(inputs) > 1:
            shape, names = (1, int(own.shape[1]), *inputs[0].size), tuple(one.name for one in inputs)
            inputs = [Node(f"{name}.joined", "cat", names, {}, {}, shape, node.layer)]
            made += inputs
        tensors = {"weight": state.keep(f"{name}.weight", own)}
        if is_vector and "bias" in node.tensors:
            tensors["bias"] = node.tensors["bias"]
        shape = (1, node.shape[1], *inputs[0].size)
        made.append(replace(node, name=name, inputs=(inputs[0].name,), tensors=tensors, shape=shape))
    both = (f"{node.name}.grid", f"{node.name}.vector")
    return [*made, Node(node.name, "add", both, {}, {}, node.shape, node.layer)]


RULES: tuple[Rule, ...] = (
    _drop_dropout,
    _compute_constants,
    _fold_shift,
    _fold_batch_norm,
    _part_joined,
)


# -- for one kernel ----------------------------------------------------------------------------------------

FUSED = "fused"  # an operator of rows alone, which `Interpreter.mixed` takes apart
UNBOUND = (-math.inf, math.inf)
CLAMPS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0)}  # where options say no other


def fuse_epilogues(graph: Graph, fits: Callable[[Node], bool]) -> Graph:
    """The graph with an addition and a clamping activation behind a convolution as part of it.

    A `fused` node has the name of the last of them and reads what the convolution reads, then what is added,
    if anything is. Options: `conv`, the convolution's name, and `bounds` of the values.

    Args:
        fits: which nodes may become part of one.
    """

    def rule(node: Node, state: _State) -> list[Node] | None:
        inputs = [state.by_name[name] for name in node.inputs]
        if not fits(node) or not (node.op in CLAMPS or (node.op == "add" and len(inputs) == 2)):
            return None
        for source in reversed(inputs):
            added = [one for one in inputs if one is not source]
            is_free = source.op == "conv2d" or (source.options.get("bounds") == UNBOUND and not added)
            if is_free and fits(source) and state.has_one_user(source.name):
                low, high = CLAMPS.get(node.op, UNBOUND)
                bounds = node.options.get("min_val", low), node.options.get("max_val", high)
                options = {"conv": source.options.get("conv", source.name), "bounds": bounds}
                names = (*source.inputs, *(one.name for one in added))
                same = all(one.shape == node.shape for one in added)
                return [replace(node, op=FUSED, inputs=names, options=options)] if same else None
        return None

    state = _State(graph, {})
    state.apply(rule)
    return state.graph
