"""The selective convolution: values, gradients, tiles, precision and memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_seg.sparse import EXCHANGES, SelectiveConv2d, SiteLayout, Step
from sparse_seg.sparse.engines import gather
from sparse_seg.sparse.engines.undilated import undilated_conv2d
from tests.reference import relative_error
from tests.slow_reference import SlowSites, slow_conv
from tests.sparse.test_layout import random_splits

LAYERS = ["entry", "entry of a dilated stage", "inner"]


def layer_case(
    layer: str, size: tuple[int, int], seed: int = 0
) -> tuple[SiteLayout, SiteLayout, SlowSites, SlowSites, int]:
    """Source and destination layouts, the slow ones, and the spacing in pixels."""
    splits = random_splits(size, 1, seed)
    mixed, slow_mixed = SiteLayout(2, size, 8, splits), SlowSites(2, size, splits)
    if layer == "entry":  # layer3's first: dense at 8 to mixed, taps 8 px apart
        return SiteLayout(2, size, 8), mixed, SlowSites(2, size), slow_mixed, 8
    return mixed, mixed, slow_mixed, slow_mixed, 32 if layer == "inner" else 16


def random_tensors(
    src: SiteLayout, dtype: torch.dtype = torch.float64, inside: int = 3, outside: int = 4
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (src.num_sites, inside), (outside, 3, 3, inside)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layer", LAYERS)
@settings(max_examples=8)
@given(size=st.tuples(st.integers(1, 11), st.integers(1, 11)), seed=st.integers(0, 999))
def test_against_the_slow_one(layer: str, exchange: str, size: tuple[int, int], seed: int) -> None:
    src, dst, slow_src, slow_dst, spacing = layer_case(layer, size, seed)
    rows, weight = random_tensors(src)
    ours = gather.selective_conv2d(rows, weight, src, dst, spacing, exchange)
    theirs = slow_conv(rows, weight.permute(0, 3, 1, 2), slow_src, slow_dst, spacing // 8, exchange)
    assert relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize("exchange", EXCHANGES)
@settings(max_examples=8)
@given(size=st.tuples(st.integers(1, 13), st.integers(1, 13)), seed=st.integers(0, 999))
def test_three_levels(exchange: str, size: tuple[int, int], seed: int) -> None:
    """A stage's entry from levels 16 and 8 to 32, 16 and 8, and an inner convolution, any splits."""
    coarse, middle = random_splits(size, 2, seed)
    two, slow_two = SiteLayout(2, size, 8, (middle,)), SlowSites(2, size, [middle])
    three, slow_three = SiteLayout(2, size, 8, (coarse, middle)), SlowSites(2, size, [coarse, middle])
    for src, slow_src, spacing in ((two, slow_two, 16), (three, slow_three, 32)):
        rows, weight = random_tensors(src)
        ours = gather.selective_conv2d(rows, weight, src, three, spacing, exchange)
        theirs = slow_conv(rows, weight.permute(0, 3, 1, 2), slow_src, slow_three, spacing // 8, exchange)
        assert relative_error(ours, theirs) < 1e-12


@pytest.mark.parametrize(
    "needed", [(True, True), (True, False), (False, True)], ids=["both", "rows", "weight"]
)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layer", LAYERS)
def test_gradcheck(layer: str, exchange: str, needed: tuple[bool, bool], device: str) -> None:
    src, dst, _, _, spacing = layer_case(layer, (3, 4), seed=1)
    src, dst = on_device(src, device), on_device(dst, device) if dst is not src else on_device(src, device)
    if layer != "entry":
        dst = src
    rows, weight = (
        tensor.to(device).requires_grad_(need)
        for tensor, need in zip(random_tensors(src, inside=2, outside=1), needed, strict=True)
    )

    def conv(rows: Tensor, weight: Tensor) -> Tensor:
        return gather.selective_conv2d(rows, weight, src, dst, spacing, exchange)

    assert dst.num_extra > 0
    assert torch.autograd.gradcheck(conv, (rows, weight), nondet_tol=1e-12)


def on_device(layout: SiteLayout, device: str) -> SiteLayout:
    splits = [split.to(device) for split in layout.splits]
    return SiteLayout(layout.batch, layout.size, layout.stride, splits, device)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tile_bytes", [1, 9 * 3 * 8 * 7], ids=["1 site", "7 sites"])
def test_many_tiles(layer: str, exchange: str, tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile borders change nothing, in either direction."""
    src, dst, _, _, spacing = layer_case(layer, (11, 12))

    def run() -> list[Tensor]:
        rows, weight = (tensor.requires_grad_() for tensor in random_tensors(src))
        out = gather.selective_conv2d(rows, weight, src, dst, spacing, exchange)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        assert rows.grad is not None
        assert weight.grad is not None
        return [out.detach(), rows.grad, weight.grad]

    whole = run()
    monkeypatch.setitem(gather.TILE_BYTES, "cpu", tile_bytes)
    assert dst.num_extra > 3 * 7, "the test needs several tiles"
    for tiled, expected in zip(run(), whole, strict=True):
        assert relative_error(tiled, expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_autocast(layer: str, dtype: torch.dtype, device: str) -> None:
    """As built-in convolutions: half-precision results, float32 gradients, both near float32's."""
    src, dst, _, _, spacing = layer_case(layer, (15, 14))
    src = on_device(src, device)
    dst = on_device(dst, device) if layer == "entry" else src
    results = []
    for enabled in (True, False):
        rows, weight = (t.to(device).requires_grad_() for t in random_tensors(src, torch.float32, 16, 8))
        with torch.autocast(device, dtype, enabled=enabled):
            out = gather.selective_conv2d(rows, weight, src, dst, spacing, "linear")
            again = gather.selective_conv2d(rows.to(out.dtype), weight, src, dst, spacing, "linear")
        assert out.dtype == again.dtype == (dtype if enabled else torch.float32)
        out.backward(torch.linspace(-1, 1, out.numel(), device=device).view_as(out).to(out.dtype))
        assert rows.grad is not None
        assert weight.grad is not None
        assert rows.grad.dtype == weight.grad.dtype == torch.float32
        results.append((out.float(), rows.grad, weight.grad))
    for half, full in zip(*results, strict=True):
        assert relative_error(half, full) < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_autocast_leaves_float64_alone() -> None:
    src, dst, _, _, spacing = layer_case("inner", (5, 6))
    rows, weight = random_tensors(src)
    with torch.autocast("cpu", torch.bfloat16):
        assert gather.selective_conv2d(rows, weight, src, dst, spacing, "linear").dtype == torch.float64


def test_half_precision_weight_gradient_over_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over many tiles must not stagnate: with each addend far below the sum, bfloat16 loses it."""
    src, dst, _, _, spacing = layer_case("inner", (32, 32))
    rows, weight = (t.abs().to(torch.bfloat16).requires_grad_() for t in random_tensors(src, inside=4))
    monkeypatch.setitem(gather.TILE_BYTES, "cpu", 9 * 4 * 2 * 2)  # two sites a tile: about 380 tiles
    out = gather.selective_conv2d(rows, weight, src, dst, spacing, "linear")
    out.backward(torch.ones_like(out))
    exact, exact_weight = (t.detach().double().requires_grad_() for t in (rows, weight))
    gather.selective_conv2d(exact, exact_weight, src, dst, spacing, "linear").sum().backward()
    assert weight.grad is not None
    assert exact_weight.grad is not None
    assert relative_error(weight.grad.double(), exact_weight.grad) < 0.01


def test_errors() -> None:
    src, dst, _, _, spacing = layer_case("inner", (5, 6))
    rows, weight = random_tensors(src)
    with pytest.raises(ValueError, match=f"{len(rows) - 1} rows given for a layout of {len(rows)} sites"):
        gather.selective_conv2d(rows[1:], weight, src, dst, spacing, "linear")
    with pytest.raises(ValueError, match="taps 8 px apart do not fall on a lattice of stride 16"):
        gather.selective_conv2d(rows, weight, src, dst, 8, "linear")
    with pytest.raises(ValueError, match=r"lattice of stride 16 \(output lattice: stride 8\)"):
        gather.selective_conv2d(rows, weight, src, SiteLayout(2, (5, 6), 8), 16, "linear")
    with pytest.raises(ValueError, match="unknown exchange 'both'"):
        SelectiveConv2d(3, 4, 16, "both")


def test_the_layer() -> None:
    """It counts sites x taps x I x O, says its spacing, and starts with He's variance over the outputs."""
    torch.manual_seed(0)
    layer = SelectiveConv2d(64, 32, 16, "nearest")
    src, dst, _, _, _ = layer_case("inner", (9, 8))
    out = layer(torch.randn(src.num_sites, 64), src, dst)
    assert out.shape == (dst.num_sites, 32)
    assert layer.macs(Step(src), Step(dst)) == dst.num_sites * 9 * 64 * 32
    assert repr(layer) == "SelectiveConv2d(64, 32, spacing=16px, exchange=nearest, engine=auto)"
    assert layer.weight.std().item() == pytest.approx((2 / (9 * 32)) ** 0.5, rel=0.05)
    table = gather.selective_conv2d(torch.zeros(src.num_sites, 64), layer.weight, src, dst, 16, "nearest")
    assert table.abs().max() == 0


def _peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that PyTorch's CPU allocator holds for `run` at once, beyond those held before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("fine_fraction", [1.0, 0.3])
def test_backward_memory(fine_fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward holds no more than twice the features it reads and one tile.

    Counted: everything backward allocates, the gradients it returns included, but for the weight's gradient,
    which is subtracted. Features it reads: rows and ghosts. The neighbour table is the forward's.
    """
    channels, tile_bytes = 64, 128 << 10
    monkeypatch.setitem(gather.TILE_BYTES, "cpu", tile_bytes)
    mask = torch.zeros(1, 30, 40, dtype=torch.bool)
    mask[:, :, : round(40 * fine_fraction)] = True
    _check_backward_memory(mask, channels, tile_bytes)


def test_backward_memory_of_a_scattered_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst case: nearly every coarse block is rim, and ghosts outnumber rows."""
    monkeypatch.setitem(gather.TILE_BYTES, "cpu", 128 << 10)
    mask = torch.rand(1, 30, 40, generator=torch.Generator().manual_seed(0)) < 0.3
    _check_backward_memory(mask, 64, 128 << 10)


def _check_backward_memory(mask: Tensor, channels: int, tile_bytes: int) -> None:
    layout = SiteLayout.from_fine_blocks(mask, (60, 80))
    rows = torch.randn(layout.num_sites, channels, requires_grad=True)
    weight = torch.randn(channels, 3, 3, channels, requires_grad=True)
    out = gather.selective_conv2d(rows, weight, layout, layout, 16, "linear")
    grad = torch.randn_like(out)
    row_bytes = rows.numel() * rows.element_size()
    ghosts = layout.neighbours(layout, 16).ghosts.shape[0]
    features = row_bytes + ghosts * channels * rows.element_size()
    peak = _peak_bytes(lambda: torch.autograd.grad(out, (rows, weight), grad))
    peak -= weight.numel() * weight.element_size()
    print(f"backward holds {peak / row_bytes:.2f} of the rows, {peak / features:.2f} of rows and ghosts")
    assert peak > row_bytes, "the gradient of the rows alone is as large"
    assert peak <= 2 * features + tile_bytes
    assert 9 * layout.num_extra * channels * 4 > 2 * features + tile_bytes, "an im2col in one piece must show"


@pytest.mark.parametrize(("spacing", "groups"), [(16, 1), (80, 9), (160, 9)])
def test_taps_outside_the_image(spacing: int, groups: int, device: str) -> None:
    """Near taps multiply their few zeros, far ones leave them out: both equal the dense convolution."""
    size = (24, 33)
    layout = SiteLayout.from_fine_blocks(torch.ones(2, 12, 17, dtype=torch.bool, device=device), size)
    assert len(layout.neighbours(layout, spacing).groups) == groups
    rows, weight = (tensor.to(device).requires_grad_() for tensor in random_tensors(layout))
    out = gather.selective_conv2d(rows, weight, layout, layout, spacing, "linear")
    seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out)
    ours = torch.autograd.grad(out, (rows, weight), seed)

    grid = torch.zeros(2 * size[0] * size[1], 3, dtype=out.dtype, device=device)
    grid = grid.index_copy(0, layout.cells, rows).view(2, *size, 3).permute(0, 3, 1, 2)
    dilation = spacing // 8
    dense = F.conv2d(grid, weight.permute(0, 3, 1, 2), None, 1, dilation, dilation)
    theirs = dense.permute(0, 2, 3, 1).flatten(0, 2)[layout.cells]
    assert relative_error(out, theirs) < 1e-12
    for our, their in zip(ours, torch.autograd.grad(theirs, (rows, weight), seed), strict=True):
        assert relative_error(our, their) < 1e-12


@pytest.mark.parametrize("exchange", EXCHANGES)
@settings(max_examples=8)
@given(size=st.tuples(st.integers(1, 11), st.integers(1, 11)), seed=st.integers(0, 999))
def test_undilated(exchange: str, size: tuple[int, int], seed: int) -> None:
    """Taps one cell of the finest grid apart, at the sites of the lattice as well."""
    src, _, slow_src, _, _ = layer_case("inner", size, seed)
    rows, weight = random_tensors(src)
    layer = SelectiveConv2d(3, 4, None, exchange).double()
    ours = torch.func.functional_call(layer, {"weight": weight}, (rows, src, src))
    expected = slow_conv(rows, weight.permute(0, 3, 1, 2), slow_src, slow_src, 1, exchange)
    assert relative_error(ours, expected) < 1e-12
    assert layer.macs(Step(src), Step(src)) == src.num_sites * 9 * 12


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_undilated_gradcheck(exchange: str) -> None:
    src, _, _, _, _ = layer_case("inner", (3, 4), seed=1)
    rows, weight = (t.requires_grad_() for t in random_tensors(src, inside=2, outside=2))
    assert src.num_extra > 0

    def conv(rows: Tensor, weight: Tensor) -> Tensor:
        return undilated_conv2d(rows, weight, src, exchange)

    assert torch.autograd.gradcheck(conv, (rows, weight), nondet_tol=1e-12)
