"""Reads the graph of `torch.export`: each call becomes a node, by what its family says (`ops.READERS`)."""

from __future__ import annotations

import operator as python_operators
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from sparse_seg.errors import SparseSegError
from sparse_seg.graph.call import PREFIX, Call, Constant, Ref, Unknown
from sparse_seg.ops import READERS, Graph, Node, UnknownOperator
from sparse_seg.ops.own_code import Part

# operators of PyTorch's that change nothing that matters here
SAME = {"contiguous", "clone", "alias", "detach", "detach_", "to", "_to_copy", "lift_fresh_copy", "type_as"}
SHAPES = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "_unsafe_view", "unflatten"}
MOVES = {"permute", "transpose", "expand", "expand_as"}
# names of tensors that no state dict has
CONSTANT, COMPUTED = "constant.", "computed."  # the latter are computed of parameters


class CaptureFailed(SparseSegError):
    """No graph can be made of a module; the message says why, in one line."""


class Reader:
    """Of one exported program, for images of `size` px; `parts` run by their own code.

    Attributes:
        nodes: what is read so far, by name; vectors: names of those that are vectors.
        known: a `Ref`, a `Constant`, an `Unknown`, or a list of such, of each value of PyTorch's.
    """

    def __init__(self, program: Any, size: tuple[int, int], parts: Mapping[str, Part]) -> None:
        self.program, self.size, self.parts = program, size, parts
        self.nodes: dict[str, Node] = {}
        self.vectors: set[str] = set()
        self.known: dict[fx.Node, Any] = {}
        self.constants: dict[str, Tensor] = {}
        self.lifted = program.state_dict, program.constants
        parameters = program.graph_signature.inputs_to_parameters.values()
        self.parameters = {name.removeprefix(PREFIX) for name in parameters}

    def read(self) -> tuple[Graph, dict[str, Tensor]]:
        signature = self.program.graph_signature
        lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node, lifted, signature.inputs_to_lifted_tensor_constants)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                output = node.args[0][-1]
        found = self.known.get(output)
        if isinstance(found, Unknown):
            error = UnknownOperator(found.message)
            error.layers = [one.layer for one in self._unknown(output) if one.layer]
            raise error
        if not isinstance(found, Ref):
            raise CaptureFailed("the network's output does not depend on its images")
        last = self.nodes[found.name]
        if last.name in self.vectors or len(last.shape) != 4:
            raise CaptureFailed(f"the network gives {list(last.shape)}, not logits [B, K, h, w] of images")
        align_corners = False
        if last.op == "resize" and last.size == self.size:
            align_corners, last = last.options["align_corners"], self.nodes[last.inputs[0]]
        graph = Graph(list(self.nodes.values()), last.name, self.size, align_corners).pruned()
        used = {name for node in graph.nodes for name in node.tensors.values()}
        return graph, {name: tensor for name, tensor in self.constants.items() if name in used}

    def _unknown(self, output: fx.Node) -> list[Unknown]:
        """All unknown operators that a value depends on, each once."""
        left, seen, found = [output], set[fx.Node](), dict[Unknown, None]()
        while left:
            node = left.pop()
            if node not in seen:
                seen.add(node)
                left.extend(node.all_input_nodes)
                if isinstance(one := self.known.get(node), Unknown):
                    found[one] = None
        return list(found)

    def _placeholder(self, node: fx.Node, lifted: dict[str, str], constants: dict[str, str]) -> None:
        shape = tuple(node.meta["val"].shape) if isinstance(node.meta.get("val"), Tensor) else ()
        if node.name in lifted:
            self.known[node] = Constant(lifted[node.name].removeprefix(PREFIX), shape)
        elif node.name in constants:
            name = f"{CONSTANT}{len(self.constants)}"
            self.constants[name] = self.program.constants[constants[node.name]].detach().clone()
            self.known[node] = Constant(name, shape)
        else:
            self.nodes[node.name] = Node(node.name, "image", shape=shape)
            self.known[node] = Ref(node.name)

    def _call(self, node: fx.Node) -> None:
        if node.target is python_operators.getitem:
            parts = self.known.get(node.args[0])  # type: ignore[arg-type]
            self.known[node] = parts[node.args[1]] if isinstance(parts, list) else parts  # type: ignore[index]
            return
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            self.known[node] = Unknown(f"{node.target} is not known to run on sites")
            return
        call = Call(self, node, schema)
        inputs = [self.known.get(one) for one in node.all_input_nodes]
        unknown = [found for found in inputs if isinstance(found, Unknown)]
        result: Any
        if unknown:
            result = unknown[0]
        elif call.operator not in SAME | SHAPES and inputs and all(isinstance(i, Constant) for i in inputs):
            result = self._computed(node)
        else:
            try:
                result = self._result(call)
            except UnknownOperator as error:
                result = Unknown(str(error), call.layer)
        self.known[node] = result
        if call.operator.endswith("_") and not call.operator.startswith("_") and node.all_input_nodes:
            self.known[node.all_input_nodes[0]] = result  # in place: whoever reads that value sees the result

    @torch.no_grad()
    def _computed(self, node: fx.Node) -> Any:
        """What is computed of the network's tensors alone, as a standardised weight is: a new constant."""
        values = node.target(  # type: ignore[operator]
            *fx.map_arg(node.args, lambda one: self._value(self.known[one])),
            **fx.map_arg(node.kwargs, lambda one: self._value(self.known[one])),
        )
        if not isinstance(values, Tensor):
            return Unknown(f"{node.target} of parameters gives several tensors")
        read = {self.known[one].name for one in node.all_input_nodes}
        trains = any(name in self.parameters or name.startswith(COMPUTED) for name in read)
        name = f"{COMPUTED if trains else CONSTANT}{len(self.constants)}"
        self.constants[name] = values.detach().clone()
        return Constant(name, tuple(values.shape))

    def _value(self, constant: Constant) -> Tensor:
        places = (constant.name, self.constants), *((PREFIX + constant.name, one) for one in self.lifted)
        found = next(tensors[name] for name, tensors in places if name in tensors)
        return found.detach().reshape(constant.shape)

    def _result(self, call: Call) -> Any:
        name = call.operator
        if name in SAME:
            return self.known[call.node.all_input_nodes[0]]
        if name in SHAPES | MOVES:
            return call.reshaped()
        read = READERS.get(name)
        if read is None:
            raise UnknownOperator(
                f"{call.where}: the operator {name} is not known to run on sites; replace the layer, or run "
                "the network dense"
            )
        return read(call)
