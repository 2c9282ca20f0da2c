"""Windows on rows and densify against slow references: values, gradients, tiles, precision, memory; and that
nothing but engine spconv needs spconv."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from sparse_seg import selective
from sparse_seg.ops import OPERATORS, Node, Reads, Spatial, convolution
from sparse_seg.run.way import Way
from sparse_seg.sites import EngineError
from tests.captured import trained
from tests.reference import relative_error
from tests.sites.rows import ENTRY, FAR, NEAR, Rows

RULES = ("linear", "nearest", "none")
SIZES = st.tuples(st.integers(1, 11), st.integers(1, 11))
WINDOWS = [ENTRY, NEAR, FAR]
CHANNELS = 4


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype).requires_grad_()


def weight_of(groups: int, out: int = 8, **more: Any) -> Tensor:
    return random(out, CHANNELS // groups, 3, 3, seed=1, **more)


def with_gradients(run: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """What `run` gives, and the gradients of its arguments."""
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, seed_like(out))]


def seed_like(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < tolerance


@pytest.mark.parametrize("exchange", RULES)
@pytest.mark.parametrize("window", WINDOWS)
@settings(max_examples=8)
@given(
    size=SIZES, levels=st.integers(1, 2), groups=st.sampled_from([1, 2, CHANNELS]), seed=st.integers(0, 999)
)
def test_convolutions(
    window: int, exchange: str, size: tuple[int, int], levels: int, groups: int, seed: int
) -> None:
    """Values and both gradients, of dense, grouped and depthwise kernels."""
    rows = Rows(size, levels, exchange, seed)
    leaves = random(2, CHANNELS, *size), weight_of(groups)
    found, expected = (
        with_gradients(functools.partial(run, window), *leaves) for run in (rows.conv, rows.slow_conv)
    )
    assert_near(found, expected)
    for number, leaf in enumerate(leaves):  # of one alone
        given = [one if one is leaf else one.detach() for one in leaves]
        out = rows.conv(window, *given)
        (alone,) = torch.autograd.grad(out, leaf, seed_like(out))
        assert torch.equal(alone, found[1 + number])


@pytest.mark.parametrize("groups", [1, CHANNELS])
@pytest.mark.parametrize("sites", [0, 7])
def test_many_tiles(sites: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile borders change nothing, in either direction; a tile has one site at least."""
    rows = Rows((11, 12), 2)
    leaves = random(2, CHANNELS, 11, 12), weight_of(groups)
    assert min(level.num_run for level in rows.sites.levels.values()) > 3 * 7, "several tiles"
    for window in WINDOWS:
        run = functools.partial(rows.conv, window)
        with monkeypatch.context() as patch:
            whole = with_gradients(run, *leaves)
            patch.setattr(convolution, "TILE_BYTES", max(1, 9 * CHANNELS * 8 * sites))
            assert_near(with_gradients(run, *leaves), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("groups", [1, CHANNELS])
def test_autocast(groups: int, dtype: torch.dtype, device: str) -> None:
    """As built-in convolutions: half-precision results, float32 gradients, both near float32's."""
    rows = Rows((15, 14), 2, device=device)
    leaves = [
        random(2, CHANNELS, 15, 14, dtype=torch.float32, device=device),
        weight_of(groups, dtype=torch.float32, device=device),
    ]
    for window in WINDOWS:
        run = functools.partial(rows.conv, window)
        full = with_gradients(run, *leaves)
        with torch.autocast(device, dtype):
            again = run(leaves[0].to(dtype), leaves[1])
            half = with_gradients(run, *leaves)
        assert half[0].dtype == again.dtype == dtype
        assert half[1].dtype == half[2].dtype == full[0].dtype == torch.float32
        assert_near([one.float() for one in half], full, tolerance=0.03 if dtype == torch.bfloat16 else 0.004)


def test_autocast_leaves_float64_alone() -> None:
    rows = Rows((5, 6))
    for groups in (1, CHANNELS):
        with torch.autocast("cpu", torch.bfloat16):
            out = rows.conv(NEAR, random(2, CHANNELS, 5, 6), weight_of(groups))
        assert out.dtype == torch.float64


def test_half_precision_weight_gradient_over_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over many tiles must not stagnate: with each addend far below the sum, bfloat16 loses it."""
    rows = Rows((32, 32))
    leaves = [
        leaf.detach().abs().to(torch.bfloat16).requires_grad_()
        for leaf in (random(2, CHANNELS, 32, 32), weight_of(1))
    ]
    monkeypatch.setattr(convolution, "TILE_BYTES", 9 * CHANNELS * 2 * 2)  # two sites a tile: hundreds
    rows.conv(NEAR, *leaves).sum().backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    rows.conv(NEAR, *exact).sum().backward()
    assert leaves[1].grad is not None
    assert exact[1].grad is not None
    assert relative_error(leaves[1].grad.double(), exact[1].grad) < 0.01


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


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_backward_memory(fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution's backward holds no more than twice what it reads and one tile, all it returns but for
    the weight's gradient included. A scattered mask is the worst case: ghosts outnumber rows."""
    channels, tile_bytes = 64, 128 << 10
    monkeypatch.setattr(convolution, "TILE_BYTES", tile_bytes)
    rows = Rows((30, 80), fraction=fraction)
    taps, mixed = rows.taps(NEAR), rows.mixed(random(2, channels, 30, 80, dtype=torch.float32).detach())
    (table, _, _), index, _ = mixed.reads(8, taps)
    table.requires_grad_()
    weight = random(channels, channels, 3, 3, dtype=torch.float32)
    operator, node = OPERATORS["conv2d"], Node("conv", "conv2d", options={"groups": 1})
    assert isinstance(operator, Spatial)
    out = operator.rows(node, {"weight": weight}, Reads(table, index, taps.number))
    seed, read = torch.randn_like(out), table.numel() * table.element_size()
    peak = _peak_bytes(lambda: torch.autograd.grad(out, (table, weight), seed)) - 4 * weight.numel()
    assert peak > read, "the gradient of what it reads alone is as large"
    assert peak <= 2 * read + tile_bytes
    assert 9 * out.numel() * 4 > 2 * read + tile_bytes, "an im2col in one piece must show"


@pytest.mark.parametrize("exchange", RULES)
@pytest.mark.parametrize("levels", [1, 2])
@settings(max_examples=15)
@given(size=SIZES, seed=st.integers(0, 999))
def test_densify(levels: int, exchange: str, size: tuple[int, int], seed: int) -> None:
    """Values and gradients, by each rule; sites keep theirs bit for bit, in float32, too."""
    rows, grid = Rows(size, levels, exchange, seed), random(2, 3, *size)
    found, expected = (
        with_gradients(run, grid)
        for run in (
            lambda grid: rows.mixed(grid).densify(exchange).tensor,
            lambda grid: rows.slow.rebuild(rows.slow.read(grid), exchange),
        )
    )
    assert_near(found, expected)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    single = grid.detach().float()
    dense = rows.mixed(single).densify(exchange).tensor
    assert torch.equal(rows.slow.read(dense), rows.slow.read(single))


class _Blocked:
    """Stands for an environment without spconv, and tells what was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] in ("spconv", "cumm"):
            self.asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_works_without_spconv(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gather never imports it, nor does `auto` on the CPU; asked for, it says what to install."""
    blocked = _Blocked()
    for name in [name for name in sys.modules if name.split(".")[0] in ("spconv", "cumm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [blocked, *sys.meta_path])
    model, images = selective(trained(), size=(64, 64)), torch.randn(2, 3, 64, 96)
    mask = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    for engine in ("auto", "gather"):
        way = Way(engine=engine)
        model.train().start(images).take(mask, way).logits().square().mean().backward()
        graded = {name for name, one in model.module.named_parameters() if one.grad is not None}
        assert {"late.0.0.weight", "late.1.0.weight", "head.weight"} <= graded
        with torch.no_grad():
            assert model.eval().start(images).take(mask, way).logits().isfinite().all()
    assert not blocked.asked
    spconv = Way(engine="spconv")
    with torch.no_grad():
        assert model.start(images).take(torch.zeros_like(mask), spconv).logits().isfinite().all()
        with pytest.raises(EngineError, match=r"spconv is not installed; for Python .*pip install spconv-cu"):
            model.start(images).take(mask, spconv).logits()
    assert blocked.asked


@pytest.mark.parametrize(
    ("size", "kernel", "dilation", "pads"),
    [
        ((33, 41), 5, (4, 4), (8, 8, 8, 8)),
        ((20, 17), 3, (2, 3), (3, 3, 2, 2)),
        ((9, 12), 3, (2, 2), (0, 4, 1, 3)),
    ],
)
def test_dilated_depthwise_in_training(
    size: tuple[int, int], kernel: int, dilation: tuple[int, int], pads: tuple[int, int, int, int]
) -> None:
    grid = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    node = Node("y", "conv2d", ("x",), options={"groups": 6})
    operator = OPERATORS["conv2d"]
    assert isinstance(operator, Spatial)
    out = operator.grid(node, {"weight": weight, "bias": bias}, grid, (1, 1), dilation, pads)
    expected = F.conv2d(F.pad(grid, pads), weight, bias, 1, 0, dilation, 6)
    assert_close(out, expected, rtol=0, atol=1e-12)
    into = torch.randn_like(expected)
    gradients = [torch.autograd.grad(one, (grid, weight, bias), into) for one in (out, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-11)
