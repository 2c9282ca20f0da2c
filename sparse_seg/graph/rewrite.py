"""Rewrites of a graph: each replaces a pattern by something that gives the same values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparse_seg.ops import OPERATORS, Graph, Node, Spatial, UnknownOperator
from sparse_seg.ops.convolution import kernel_of

Tensors = dict[str, Tensor]
IGNORES = {"conv2d": 0.0, "max_pool2d": -math.inf, "avg_pool2d": 0.0}  # values that stand for no padding


# -- padding -----------------------------------------------------------------------------------------------


def fold_pads(graph: Graph) -> Graph:
    """Give padding layers to the windows that read them, through what treats each place by itself.

    Where something but zero then stands outside the image (a norm's shift), a convolution reads what its
    input has above that, and adds what the outside alone gives.

    Raises:
        UnknownOperator: padding that no window reads.
    """
    users = graph.users()
    replaced: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "pad":
            _push_pad(node, graph, users, replaced)
    nodes = [new for node in graph.nodes for new in replaced.get(node.name, [node])]
    return replace(graph, nodes=nodes)


def _push_pad(pad: Node, graph: Graph, users: dict[str, list[Node]], replaced: dict[str, list[Node]]) -> None:
    source = graph.node(pad.inputs[0])
    replaced[pad.name] = []

    def start() -> Node:
        """The vector that stands outside."""
        shape = (1, source.shape[1], 1, 1)
        zeros = Node(f"{pad.name}.outside", "zeros", shape=shape, layer=pad.layer)
        replaced[pad.name] = [zeros]
        if pad.options["value"] != 0:
            number = {"number": pad.options["value"]}
            shifted = Node(f"{pad.name}.value", "add", (zeros.name,), {}, number, shape, pad.layer)
            replaced[pad.name].append(shifted)
        return replaced[pad.name][-1]

    def visit(padded: Node, name: str, outside: Node | None) -> None:
        """Users of a padded value read `name`, which is not."""
        for user in users[padded.name]:
            operator = OPERATORS[user.op]
            now = replaced.get(user.name, [user])[-1]
            now = replace(now, inputs=tuple(name if one == padded.name else one for one in now.inputs))
            if isinstance(operator, Spatial) and operator.window(user).kernel != (1, 1):
                replaced[user.name] = _padded(now, pad, outside)
            elif len(user.inputs) == 1 and not (operator.is_pool or operator.needs_grid or user.op == "pad"):
                if isinstance(operator, Spatial) and operator.window(user).stride != (1, 1):
                    raise UnknownOperator(f"{user.layer}: padding is read by a strided 1x1 convolution")
                clone = replace(
                    user,
                    name=f"{user.name}.outside",
                    inputs=((outside or start()).name,),
                    options=user.options | ({"frozen": True} if user.op == "batch_norm" else {}),
                    shape=(*user.shape[:-2], 1, 1),
                )
                replaced[user.name] = [clone, replace(now, shape=(*user.shape[:-2], *source.size))]
                visit(user, user.name, clone)
            else:
                raise UnknownOperator(f"{pad.layer or 'the network'}: padding is read by {user.where}")

    visit(pad, source.name, None)


def _padded(user: Node, pad: Node, outside: Node | None) -> list[Node]:
    """What gives a window's value without the pad; outside stands a vector, or the pad's own value."""
    value, options = pad.options["value"], dict(user.options)
    if pad.options["pads"] == "same":
        if options["padding"] != [0, 0]:
            raise UnknownOperator(f"{user.where}: padded twice")
        options["padding"] = "same"
    else:
        left, _, above, _ = pad.options["pads"]
        options["padding"] = [options["padding"][0] + above, options["padding"][1] + left]
    if outside is None and IGNORES.get(user.op) == value:
        options |= {"count_outside": True} if user.op == "avg_pool2d" else {}
        return [replace(user, options=options)]
    if outside is None or user.op != "conv2d":
        raise UnknownOperator(f"{user.where}: reads padding of {value}")
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
    names = {name for node in state.graph.nodes for name in node.tensors.values()}
    return state.graph, {name: state.tensors[name] for name in names}


class _State:
    """A graph while it is rewritten."""

    def __init__(self, graph: Graph, tensors: Tensors) -> None:
        self.graph, self.tensors = graph, tensors

    def apply(self, rule: Callable[[Node, _State], list[Node] | None]) -> None:
        """A rule gives what stands in a node's place, the last of it makes its value; None: the node stays.

        An empty list: its first input stands for it.
        """
        self.users, self.by_name = self.graph.users(), self.graph.by_name
        names: dict[str, str] = {}  # of values that others stand for now
        nodes: list[Node] = []
        for old in self.graph.nodes:
            node = replace(old, inputs=tuple(names.get(name, name) for name in old.inputs))
            made = rule(node, self)
            made = [node] if made is None else made
            if not made:
                names[node.name] = node.inputs[0]
            self.by_name.update((one.name, one) for one in made)
            nodes += made
        output = names.get(self.graph.output, self.graph.output)
        self.graph = replace(self.graph, nodes=nodes, output=output).pruned()

    def of(self, node: Node) -> Tensors:
        return {role: self.tensors[name] for role, name in node.tensors.items()}

    def has_one_user(self, name: str) -> bool:
        return len(self.users.get(name, ())) == 1 and name != self.graph.output

    def keep(self, name: str, tensor: Tensor) -> str:
        """Enter a tensor that the network has not."""
        self.tensors[name] = tensor.detach()
        return name


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
        chosen = [number for number, one in enumerate(vectors) if one == is_vector]
        own = torch.cat([columns[number] for number in chosen], 1)
        size = parts[chosen[0]].size
        names = tuple(parts[number].name for number in chosen)
        if len(names) > 1:
            shape = (1, int(own.shape[1]), *size)
            made.append(Node(f"{node.name}.{suffix}.joined", "cat", names, {}, {}, shape, node.layer))
            names = (made[-1].name,)
        tensors = {"weight": state.keep(f"{node.name}.{suffix}.weight", own)}
        if is_vector and "bias" in node.tensors:
            tensors["bias"] = node.tensors["bias"]
        shape = (1, node.shape[1], *size)
        made.append(
            Node(f"{node.name}.{suffix}", "conv2d", names, tensors, dict(node.options), shape, node.layer)
        )
    inputs = (f"{node.name}.grid", f"{node.name}.vector")
    return [*made, Node(node.name, "add", inputs, {}, {}, node.shape, node.layer)]


RULES: tuple[Callable[[Node, _State], list[Node] | None], ...] = (
    _drop_dropout,
    _compute_constants,
    _fold_shift,
    _fold_batch_norm,
    _part_joined,
)
