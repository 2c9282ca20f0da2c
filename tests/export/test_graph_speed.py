"""What makes exported graphs of captured networks fast, and that it changes no number."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_seg import selective
from sparse_seg.export import ExportOptions, StaticNetwork, to_onnx
from sparse_seg.run.values import Interpreter
from sparse_seg.run.way import Way
from sparse_seg.sites import Taps
from tests.reference import relative_error


def conv(inside: int, out: int, kernel: int = 1, act: Any = nn.ReLU, **options: Any) -> nn.Sequential:
    """A convolution with a norm and an activation."""
    options.setdefault("padding", options.get("dilation", 1) * (kernel // 2))
    return nn.Sequential(
        nn.Conv2d(inside, out, kernel, bias=False, **options), nn.BatchNorm2d(out), act(inplace=True)
    )


class Excite(nn.Module):
    """Squeeze-and-excite."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class ASPP(nn.Module):
    """Atrous branches, a 1x1 and the image's mean."""

    def __init__(self, channels: int, width: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.point, self.pool = conv(channels, width), conv(channels, width)
        self.atrous = nn.ModuleList(conv(channels, width, 3, dilation=rate) for rate in rates)
        self.project = conv((len(rates) + 2) * width, width)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([self.point(x), *(one(x) for one in self.atrous), pooled], 1))


class Atrous(nn.Module):
    """Output stride 8; an ASPP of which some taps or all but one lie outside small images."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(*(conv(a, b, 3, stride=2) for a, b in ((3, 6), (6, 8), (8, 12))))
        self.body = nn.Sequential(conv(12, 12, 3, dilation=2), Excite(12))
        self.aspp = ASPP(12, 8, (2, 7, 40)) if head else conv(12, 8)
        self.classifier = nn.Conv2d(8, 5, 1)

    def forward(self, images):
        logits = self.classifier(self.aspp(self.body(self.stem(images))))
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear")


@pytest.mark.parametrize("size", [(64, 96), (47, 200)])
@torch.no_grad()
def test_taps_that_are_always_outside_are_left_out(size):
    torch.manual_seed(0)
    module = Atrous().double().eval()
    network = selective(module, (8, 16), "edge", size=(64, 128)).eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    run = Interpreter(network.geometry, network.tensors, images)
    counts = [run.taps[node.name].number for node in network.graph.nodes if node.layer.endswith("atrous.2.0")]
    assert counts == [1]  # 320 px
    assert relative_error(network.dense(images, 8), module(images)) < 1e-12
    blocks = torch.ones(2, -(-size[0] // 16), -(-size[1] // 16), dtype=torch.bool)
    expected = network.dense(images, 8)
    assert relative_error(network(images, fine_blocks=blocks), expected) < 0.1  # squeeze-and-excite
    module.body[1] = nn.Identity()
    network = selective(module, (8, 16), "edge", size=(64, 128)).eval()
    assert relative_error(network(images, fine_blocks=blocks), network.dense(images, 8)) < 1e-12


@torch.no_grad()
def test_taps_left_out_of_what_is_patched():
    """Behind the rows, too: 328 px mix phases, so that the window is late."""
    torch.manual_seed(0)
    module = Atrous(head=False).double().eval()
    module.body[1], module.aspp = nn.Identity(), conv(12, 8, 3, dilation=41).double().eval()
    network = selective(module, (8, 16), "edge", size=(64, 128)).eval()
    images, blocks = torch.randn(1, 3, 64, 96).double(), torch.ones(1, 4, 6, dtype=torch.bool)
    found = network.start(images).take(blocks, Way(merge="patch")).logits()
    assert relative_error(found, network.dense(images, 8)) < 1e-12


def test_which_taps_reach_an_image():
    taps = Taps((-64, 0, 64), (-32, 0, 32))
    assert taps.part(taps.inside((65, 33))) == taps
    assert taps.part(taps.inside((64, 33))) == Taps((0,), (-32, 0, 32))
    assert taps.part(taps.inside((64, 32))) == Taps((0,), (0,))
    assert Taps((64, 128), (0,)).inside((64, 64)) == (slice(0, 1), slice(0, 1))


def test_only_a_heads_last_pooling_weighs_all_sites():
    """A backbone's last squeeze-and-excite reads the lattice, which then is not computed twice."""
    torch.manual_seed(0)
    graph = selective(Atrous().eval(), (8, 16), "edge", size=(64, 128)).geometry
    assert [graph.nodes[name].layer for name in graph.final_pools] == ["aspp"]
    alone = selective(Atrous(head=False).eval(), (8, 16), "edge", size=(64, 128)).geometry
    assert [alone.nodes[name].layer for name in alone.final_pools] == ["body.1"]


def test_uneven_padding_is_part_of_the_convolution():
    pytest.importorskip("onnx", reason="needs the package onnx")
    module: Any = Atrous().eval()
    module.stem[0][0].padding, module.stem = (0, 0), nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), module.stem)
    network = selective(module, (8, 16), "edge", size=(64, 128)).eval()
    form = StaticNetwork(network, ExportOptions((64, 96), given=True))
    nodes = to_onnx(form).graph.node
    pads = [list(one.ints) for node in nodes for one in node.attribute if one.name == "pads"]
    assert [0, 0, 1, 1] in pads
    assert not any(node.op_type == "Pad" for node in nodes)
