"""Parts that no operator here makes run by their own code on complete grids, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_seg
from sparse_seg.errors import CheckpointError, SparseSegError
from sparse_seg.export.onnx_file import export_onnx
from sparse_seg.export.options import ExportOptions
from sparse_seg.run.way import Way
from tests.graph.toys import Doing, Toy, check_module
from tests.reference import relative_error

SIZE = (64, 64)


class Attention(nn.Module):
    """Of each place to all others (Wang et al., "Non-local Neural Networks", CVPR 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (one(x).flatten(2) for one in (self.query, self.key, self.value))
        weights = (query.transpose(1, 2) @ key).softmax(2)
        return self.norm(x + (value @ weights.transpose(1, 2)).reshape(x.shape))


class Attending(Toy):
    """Behind the rows, or where all is early."""

    def __init__(self, classes: int = 5, early: bool = False) -> None:
        super().__init__(classes)
        self.attention, self.early = Attention(), early

    def forward(self, images: Tensor) -> Tensor:
        if self.early:
            x = F.relu(self.b(self.a(self.attention(self.stem(images)))))
        else:
            x = self.attention(self.body(images))
        return F.interpolate(self.head(x), images.shape[2:], mode="bilinear")


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Doing(d=nn.Conv2d(8, 8, 3, 1, 2, 2, padding_mode="reflect")), "d runs by its own"),
        (lambda: Toy(track_running_stats=False), "stem.1, norm run by their own"),
    ],
)
def test_other_layers_that_no_operator_makes(build: Callable[[], nn.Module], says: str):
    report = check_module(build(), size=(72, 100)).report()
    assert report.limit.endswith(f"; {says} code, on complete grids")


@pytest.mark.parametrize("early", [False, True])
@torch.no_grad()
def test_attention_is_exact(early: bool):
    net = check_module(Attending(early=early), size=(72, 100))
    images, blocks = torch.randn(2, 3, 72, 100).double(), torch.rand(2, 5, 7) < 0.5
    assert relative_error(net.for_inference()(images, blocks), net(images, blocks)) < 1e-12
    coarse = net.start(images).start_coarse()
    assert relative_error(coarse.take(blocks).logits(), net(images, blocks)) < 1e-12
    row = next(row for row in net.report().rows if row.layer == "attention")
    places = 8 * 8
    assert row.dense == places * (3 * 64 + 2 * 8 * places)  # three convolutions, two products
    again = copy.deepcopy(net)
    assert torch.equal(again(images, blocks), net(images, blocks))


def test_attention_trains():
    module = Attending().double().train()
    twin, images = copy.deepcopy(module), torch.randn(2, 3, 64, 64).double()
    net = sparse_seg.selective(module, size=SIZE)
    for one in (net.dense(images, 8), twin(images)):
        one.square().mean().backward()
    for ours, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    for buffer, other in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(buffer, other)


def test_files_that_hold_it(tmp_path: Path):
    net, path = sparse_seg.selective(Attending().eval(), size=SIZE), tmp_path / "net.safetensors"
    with pytest.raises(CheckpointError, match=r"^attention runs by its own code, .* export to ONNX"):
        sparse_seg.save_model(net, path)
    assert not path.exists()
    pytest.importorskip("onnxruntime")
    export_onnx(net, tmp_path / "net.onnx", ExportOptions((64, 96)))  # checks itself
    with pytest.raises(SparseSegError, match="attention reads whole images behind the rows"):
        net.start(torch.zeros(1, 3, 64, 64)).take(torch.zeros(1, 4, 4, dtype=torch.bool), Way(merge="patch"))
