"""Merge `patch` of captured networks: coarse blocks keep the coarse logits, fine ones are decoded alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_seg
from sparse_seg.export import ExportOptions, export_onnx
from sparse_seg.models.way import Way
from sparse_seg.sparse.features import double
from tests.reference import relative_error

PATCH = Way(merge="patch")


class Decoder(nn.Module):
    """Output stride 8 by dilation, and a decoder at stride 4 that reads a skip, as DeepLabV3+'s."""

    def __init__(self, align_corners: bool, skip: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 4, 1)
        self.down = nn.Conv2d(6, 8, 3, 2, 1)
        self.wide = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 2, 2), nn.ReLU()
        )
        self.refine = nn.Conv2d(8, 8, 3, 1, 1)
        self.skip = nn.Conv2d(6, 3, 1) if skip else None
        self.decode = nn.Sequential(
            nn.Conv2d(11, 8, 3, 1, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, 1, 1),
            nn.ReLU(),
        )
        self.classify = nn.Conv2d(8, 5, 1)
        self.align_corners = align_corners

    def forward(self, images: Tensor) -> Tensor:
        low = self.stem(images)
        x = self.refine(self.wide(self.down(low)))
        if self.skip is not None:
            x = F.interpolate(x, low.shape[2:], mode="bilinear", align_corners=self.align_corners)
            x = self.decode(torch.cat([x, self.skip(low)], 1))
        x = self.classify(x)
        return F.interpolate(x, images.shape[2:], mode="bilinear", align_corners=self.align_corners)


def network(align_corners: bool = False, skip: bool = True) -> sparse_seg.SelectiveNetwork:
    torch.manual_seed(0)
    module = Decoder(align_corners, skip).double()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return sparse_seg.selective(module.eval(), size=(64, 128))


@pytest.mark.parametrize("size", [(64, 96), (75, 91)])
@pytest.mark.parametrize(("align_corners", "skip"), [(False, True), (True, True), (False, False)])
@torch.no_grad()
def test_both_ends_are_the_dense_networks(align_corners: bool, skip: bool, size: tuple[int, int]) -> None:
    net = network(align_corners, skip)
    for model in (net, net.for_inference()):
        images = torch.randn(2, 3, *size).double()
        every = torch.ones(2, -(-size[0] // 16), -(-size[1] // 16), dtype=torch.bool)
        fine, coarse = (model.start(images).take(mask, PATCH).logits() for mask in (every, ~every))
        assert relative_error(fine, net.dense(images, 8)) < 1e-12
        assert relative_error(coarse, net.dense(images, 16)) < 1e-12


@torch.no_grad()
def test_coarse_blocks_keep_the_coarse_pass_and_fine_ones_read_it() -> None:
    """Against the decoder on whole grids, layer by layer, in which coarse blocks keep the coarse values."""
    net = network()
    module, images = net.module, torch.randn(1, 3, 64, 96).double()
    assert isinstance(module, Decoder)
    mask = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    at_4 = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    found = net.start(images).take(mask, PATCH).grid_logits()

    run = net.start(images).take(mask)  # late values of it see the densified rows
    assert run._values is not None
    (name,) = net.geometry.exits
    rows = run._values[name].densify().tensor
    lattice = run._values[name].lattice.tensor
    low = module.stem(images)

    fine, coarse = module.refine(rows), module.refine(lattice)  # taps 8 px apart, or a cell of 16
    at_8 = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    fine = fine.where(at_8, double(coarse, (8, 12)))
    values = [_up(grid, stride, low.shape[2:]) for grid, stride in ((fine, 8), (coarse, 16))]
    joined = [torch.cat([value, module.skip(low)], 1) for value in values]  # type: ignore[misc]
    coarse_values, mixed = joined[1], joined[0].where(at_4, joined[1])
    for layer in [*module.decode, module.classify]:
        coarse_values, mixed = layer(coarse_values), layer(mixed)
        mixed = mixed.where(at_4, coarse_values)
    assert relative_error(found, mixed) < 1e-12
    assert 0.2 < mask.float().mean() < 0.8


def _up(grid: Tensor, stride: int, size: torch.Size) -> Tensor:
    """To stride 4, at the places that an upsampling from stride 8 reads: (q + 1/2) / 2 - 1/2 cells of it."""
    for axis, length in enumerate(size):
        places = ((torch.arange(length).double() + 0.5) / 2 - 0.5) * 8 / stride
        count = grid.shape[2 + axis]
        places = places.clamp(0, count - 1)
        first = places.floor().long()
        share = (places - first).reshape([-1 if place == axis else 1 for place in range(2)])
        second = (first + 1).clamp(max=count - 1)
        grid = grid.index_select(2 + axis, first) * (1 - share) + grid.index_select(2 + axis, second) * share
    return grid


@torch.no_grad()
def test_it_costs_the_share_of_fine_blocks() -> None:
    net, images = network(), torch.randn(1, 3, 128, 128).double()
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :2] = True
    late = [net.start(images).take(mask, way).macs()["late"] for way in (PATCH, Way())]
    dense = net.start(images).follow(Way.dense(8)).macs()["late"]
    coarse = net.start(images).follow(Way.dense(16)).macs()["late"]
    assert late[1] == dense
    assert late[0] == coarse + dense // 4


def test_a_pass_with_gradients_gives_the_same_and_they_reach_the_images() -> None:
    net, images = network(), torch.randn(1, 3, 64, 96).double().requires_grad_()
    logits = net.start(images).follow(PATCH).logits()
    logits.square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    with torch.no_grad():
        run = net.start(images.detach()).follow(PATCH)
        assert relative_error(run.logits(), logits.detach()) < 1e-12
        again = run.take(run.mask, Way())  # type: ignore[arg-type]
        assert relative_error(again.logits(), net(images.detach())) < 1e-12, "whole again"


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_exported(batch: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = network().float()
    options = ExportOptions((75, 91), batch, merge="patch", tiles=False)
    assert export_onnx(net, tmp_path / "a.onnx", options)["merge"] == "patch"  # checked against the model
