"""Rewrites of a graph: what they take out, and that values stay."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor, nn

from sparse_seg import selective
from sparse_seg.graph.rewrite import FUSED, fuse_epilogues
from sparse_seg.ops import Graph
from tests.graph.layers import randomise
from tests.graph.toys import Toy
from tests.reference import relative_error


class Everything(Toy):
    """Dropout, batch norms, padding before a norm, and an image pooling that is joined with a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.before, self.pool = nn.Dropout(), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1)
        self.deep, self.head = nn.Conv2d(8, 8, 3, 1, 0, 2, groups=8), nn.Conv2d(16, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.drop(self.body(images))
        x = self.deep(self.before(nn.functional.pad(x, (2, 2, 2, 2))))
        return self.head(torch.cat([self.pool(x).expand_as(x), x], 1))


def ops(graph: Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


@torch.no_grad()
def test_a_folded_graph_has_convolutions_alone_and_the_same_values():
    """But for the norm behind the constant that stands outside: it has no convolution before it."""
    network = selective(randomise(Everything()).double().eval(), size=(64, 64))
    folded = network.for_inference()
    before, after = ops(network.graph), ops(folded.graph)
    gone = {"dropout", "zeros", "conv2d_of_constant", "cat"}
    assert gone <= before.keys()
    assert not gone & after.keys()
    assert (before["batch_norm"], after["batch_norm"]) == (4, 1)
    assert after["conv2d"] == before["conv2d"] + 1, "the head's, of the grid and of the vector"
    images, blocks = torch.randn(2, 3, 70, 53).double(), torch.rand(2, 5, 4) < 0.5
    assert relative_error(folded(images, blocks), network(images, blocks)) < 1e-12


def test_padding_moves_into_the_window_that_reads_it():
    """Where a constant then stands outside, the window reads what its input has above it."""
    network = selective(randomise(Everything()).eval(), size=(64, 64))
    assert "pad" not in ops(network.graph)
    deep = next(node for node in network.graph.nodes if node.op == "conv2d" and node.layer == "deep")
    assert deep.options["padding"] == [2, 2]
    assert ops(network.graph)["conv2d_of_constant"] == 1


class Residual(Toy):
    """What may follow convolutions: sums with what comes before or beside, activations, and two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(5))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.body(images)
        x = torch.relu(self.convs[0](x) + x)
        x = nn.functional.relu6(self.convs[1](x) + self.convs[2](x))
        shared = self.convs[3](x)
        x = nn.functional.hardtanh(self.convs[4](x), -2, 3) + nn.functional.silu(shared)
        return self.head(x + torch.relu(shared))


def test_what_follows_a_convolution_becomes_part_of_it():
    graph = selective(randomise(Residual()).eval(), size=(64, 64)).graph
    ours = [node for node in graph.nodes if node.layer.startswith("convs")]
    found = fuse_epilogues(graph, lambda node: True)
    fused = [node for node in found.nodes if node.op == FUSED][-3:]
    assert [node.options["bounds"] for node in fused] == [(0, math.inf), (0, 6), (-2, 3)]
    assert [node.options["conv"] for node in fused] == [ours[n].name for n in (0, 2, 4)]
    assert [len(node.inputs) for node in fused] == [2, 2, 1]
    assert fused[1].inputs[1] == ours[1].name, "of two convolutions the second, which comes last"
    assert {ours[1].name, ours[3].name} <= found.by_name.keys(), "another node reads them"
    assert found.output == graph.output
    assert fuse_epilogues(graph, lambda node: False) == graph
