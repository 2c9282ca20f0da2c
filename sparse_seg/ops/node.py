"""A network as plain data: operators in the order they run, with the values and tensors that they read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Node:
    """An operator's call.

    Args:
        name: of the value that it makes; unlike all others.
        op: a name in `ops.OPERATORS`.
        inputs: names of the values that it reads.
        tensors: names in the network's state dict, by role.
        options: of the operator, plain JSON values.
        shape: of the value as captured: batch, channels (one axis or several), height, width; of a vector of
            each image, height and width are 1.
        layer: the module it stands in, for messages.
    """

    name: str
    op: str
    inputs: tuple[str, ...] = ()
    tensors: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    layer: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width as captured."""
        return self.shape[-2], self.shape[-1]

    @property
    def where(self) -> str:
        """For messages: the operator and the layer that it stands in."""
        return f"{self.op} in {self.layer}" if self.layer else self.op


@dataclass
class Graph:
    """A network from images to logits.

    Args:
        nodes: each after those that it reads; the first is the image.
        output: name of the logits, before the last upsampling.
        size: of the images as captured, px.
        align_corners: of the last upsampling, from the logits to the images' size.
    """

    nodes: list[Node]
    output: str
    size: tuple[int, int]
    align_corners: bool = False

    def node(self, name: str) -> Node:
        return self.by_name[name]

    @property
    def by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @property
    def tensor_names(self) -> set[str]:
        return {name for node in self.nodes for name in node.tensors.values()}

    @property
    def own_code(self) -> list[str]:
        """The layers that run by their own code, see `ops/own_code.py`."""
        return [node.layer for node in self.nodes if node.op == "module"]

    def users(self) -> dict[str, list[Node]]:
        """The nodes that read each value."""
        users: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for name in node.inputs:
                users[name].append(node)
        return users

    def pruned(self) -> Graph:
        """Without what the output does not need."""
        needed, nodes = {self.output}, []
        for node in reversed(self.nodes):
            if node.name in needed or node.op == "image":
                needed.update(node.inputs)
                nodes.append(node)
        return Graph(nodes[::-1], self.output, self.size, self.align_corners)
