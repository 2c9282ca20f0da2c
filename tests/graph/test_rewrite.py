"""Each rewrite of a graph by itself: what it takes out, and that values stay."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from sparse_seg import selective
from sparse_seg.graph import rewrite
from sparse_seg.run.segmentor import Tensors
from sparse_seg.run.selective import build_network
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


def ops(graph: rewrite.Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


@pytest.mark.parametrize(
    ("rules", "gone", "come"),
    [
        (["_drop_dropout"], {"dropout": 1}, {}),
        (["_fold_batch_norm"], {"batch_norm": 2}, {}),
        (["_compute_constants"], {"zeros": 1, "conv2d_of_constant": 1, "batch_norm": 1}, {}),
        (["_compute_constants", "_fold_shift"], {"zeros": 1, "add": 1}, {}),
        (["_part_joined"], {"cat": 1}, {"conv2d": 1, "add": 1}),
    ],
)
@torch.no_grad()
def test_rule(rules: list[str], gone: dict[str, int], come: dict[str, int]):
    network = selective(randomise(Everything()).double().eval(), size=(64, 64))
    state = rewrite._State(network.graph, network.tensors)
    for name in rules:
        state.apply(getattr(rewrite, name))
    output = state.names.get(network.graph.output, network.graph.output)
    graph = dataclasses.replace(network.graph, nodes=state.nodes, output=output).pruned()
    before, after = ops(network.graph), ops(graph)
    for op, count in gone.items():
        assert before[op] - after[op] == count, op
    for op, count in come.items():
        assert after[op] - before[op] == count, op
    used = {name for node in graph.nodes for name in node.tensors.values()}
    module = Tensors({name: state.tensors[name].detach().clone() for name in used})
    rewritten = build_network(graph, module, {}, network.settings).eval()
    images, blocks = torch.randn(2, 3, 70, 53).double(), torch.rand(2, 5, 4) < 0.5
    assert relative_error(rewritten(images, blocks), network(images, blocks)) < 1e-12


def test_padding_moves_into_the_window_that_reads_it():
    """Where a constant then stands outside, the window reads what its input has above it."""
    network = selective(randomise(Everything()).eval(), size=(64, 64))
    assert "pad" not in ops(network.graph)
    deep = next(node for node in network.graph.nodes if node.op == "conv2d" and node.layer == "deep")
    assert deep.options["padding"] == [2, 2]
    assert ops(network.graph)["conv2d_of_constant"] == 1
