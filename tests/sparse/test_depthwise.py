"""Depthwise convolution and average pooling over sites: values against `F.conv2d` and loops, gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_seg.sparse import (
    EXCHANGES,
    SelectiveAvgPool2d,
    SelectiveDepthwiseConv2d,
    SiteLayout,
    Step,
    rows_to_grid,
)
from sparse_seg.sparse.depthwise import depthwise_conv2d
from tests.reference import relative_error
from tests.slow_reference import slow_conv
from tests.sparse.test_conv import LAYERS, layer_case, on_device

CHANNELS = 5


def tensors(layout: SiteLayout) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(layout.num_sites, CHANNELS, dtype=torch.float64, generator=generator)
    return rows, torch.randn(CHANNELS, 3, 3, 1, dtype=torch.float64, generator=generator)


def full_weight(weight: Tensor) -> Tensor:
    """A depthwise weight as that of a convolution over all channels, OIHW."""
    full = weight.new_zeros(CHANNELS, CHANNELS, 3, 3)
    for channel in range(CHANNELS):
        full[channel, channel] = weight[channel, :, :, 0]
    return full


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layer", LAYERS)
@settings(max_examples=8)
@given(size=st.tuples(st.integers(1, 11), st.integers(1, 11)), seed=st.integers(0, 999))
def test_convolution_against_the_slow_one(
    layer: str, exchange: str, size: tuple[int, int], seed: int
) -> None:
    src, dst, slow_src, slow_dst, spacing = layer_case(layer, size, seed)
    rows, weight = tensors(src)
    ours = depthwise_conv2d(rows, weight, src, dst, spacing, exchange)
    theirs = slow_conv(rows, full_weight(weight), slow_src, slow_dst, spacing // 8, exchange)
    assert relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("size", [(8, 10), (9, 13)])
@pytest.mark.parametrize("spacing", [8, 96])
def test_dense_and_all_fine_equal_pytorch(size: tuple[int, int], spacing: int, device: str) -> None:
    """Forward and both gradients."""
    dense = SiteLayout(2, size, 8, device=device)
    blocks = torch.ones(2, -(-size[0] // 2), -(-size[1] // 2), dtype=torch.bool, device=device)
    layouts = [dense] if spacing == 8 else [dense, SiteLayout.from_fine_blocks(blocks, size)]
    for layout in layouts:
        rows, weight = (t.to(device).requires_grad_() for t in tensors(layout))
        layer = SelectiveDepthwiseConv2d(CHANNELS, spacing).to(device, torch.float64)
        out = torch.func.functional_call(layer, {"weight": weight}, (rows, layout, layout))
        grid = rows_to_grid(torch.empty_like(rows).index_copy(0, layout.cells, rows), 2, size)
        d = spacing // 8
        expected = F.conv2d(grid, weight.permute(0, 3, 1, 2), None, 1, d, d, CHANNELS)
        expected = expected.permute(0, 2, 3, 1).reshape(-1, CHANNELS)[layout.cells]
        assert relative_error(out, expected) < 1e-12
        factor = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out)
        ours = torch.autograd.grad(out, (rows, weight), factor)
        theirs = torch.autograd.grad(expected, (rows, weight), factor)
        for mine, other in zip(ours, theirs, strict=True):
            assert relative_error(mine, other) < 1e-12
        assert layer.macs(Step(layout), Step(layout)) == layout.num_sites * 9 * CHANNELS


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layer", LAYERS)
def test_gradcheck(layer: str, exchange: str, device: str) -> None:
    src, dst, _, _, spacing = layer_case(layer, (3, 4), seed=1)
    src = on_device(src, device)
    dst = on_device(dst, device) if layer == "entry" else src
    rows, weight = (t[:, :2] if t.ndim == 2 else t[:2] for t in tensors(src))
    rows, weight = rows.to(device).requires_grad_(), weight.to(device).requires_grad_()
    assert dst.num_extra > 0

    def conv(rows: Tensor, weight: Tensor) -> Tensor:
        return depthwise_conv2d(rows, weight, src, dst, spacing, exchange)

    assert torch.autograd.gradcheck(conv, (rows, weight), nondet_tol=1e-12)
    pool = SelectiveAvgPool2d(spacing, exchange)
    assert torch.autograd.gradcheck(lambda rows: pool(rows, src, dst), (rows,), nondet_tol=1e-12)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layer", LAYERS)
@settings(max_examples=8)
@given(size=st.tuples(st.integers(1, 11), st.integers(1, 11)), seed=st.integers(0, 999))
def test_pooling_against_the_slow_convolution(
    layer: str, exchange: str, size: tuple[int, int], seed: int
) -> None:
    """The sum over a window, over that of ones: what has no value counts in neither."""
    src, dst, slow_src, slow_dst, spacing = layer_case(layer, size, seed)
    rows, _ = tensors(src)
    window = torch.zeros(CHANNELS, 3, 3, 1, dtype=torch.float64)
    window[:, 1:, 1:] = 1
    step = spacing // 8
    sums, counts = (
        slow_conv(values, full_weight(window), slow_src, slow_dst, step, exchange)
        for values in (rows, torch.ones_like(rows))
    )
    ours = SelectiveAvgPool2d(spacing, exchange)(rows, src, dst)
    assert relative_error(ours, sums / counts) < 1e-12


@pytest.mark.parametrize("size", [(8, 10), (9, 13), (1, 2)])
def test_strided_pooling_is_pytorchs(size: tuple[int, int]) -> None:
    fine = SiteLayout(2, size, 8)
    coarse = SiteLayout(2, (-(-size[0] // 2), -(-size[1] // 2)), 16)
    rows, _ = tensors(fine)
    expected = F.avg_pool2d(rows_to_grid(rows, 2, size), 2, 2, ceil_mode=True, count_include_pad=False)
    ours = rows_to_grid(SelectiveAvgPool2d(8)(rows, fine, coarse), 2, coarse.size)
    assert relative_error(ours, expected) < 1e-12


def test_autocast_and_errors() -> None:
    src, dst, _, _, spacing = layer_case("inner", (15, 14))
    rows, weight = (t.float() for t in tensors(src))
    full = depthwise_conv2d(rows, weight, src, dst, spacing, "linear")
    with torch.autocast("cpu", torch.bfloat16):
        half = depthwise_conv2d(rows, weight, src, dst, spacing, "linear")
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), full) < 0.03
    with pytest.raises(ValueError, match="rows given for a layout of"):
        depthwise_conv2d(rows[1:], weight, src, dst, spacing, "linear")
    with pytest.raises(ValueError, match="taps 8 px apart do not fall on a lattice of stride 16"):
        depthwise_conv2d(rows, weight, src, dst, 8, "linear")
    with pytest.raises(ValueError, match="unknown exchange 'both'"):
        SelectiveDepthwiseConv2d(3, 16, "both")
