"""The triton engine against F.conv2d, gather and float64; on the CPU Triton interprets the kernels."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_seg import selective
from sparse_seg.export import ExportOptions, StaticNetwork
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.sites import Level, LevelPlan, Taps, triton
from sparse_seg.sites.values import Epilogue
from tests.captured import trained
from tests.export.kinds import kind_model
from tests.reference import relative_error
from tests.sites.rows import Case

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is optional"),
    pytest.mark.usefixtures("interpreted"),
]


def run(model: SelectiveNetwork, images: Tensor, mask: Tensor, **way: Any) -> Tensor:
    return model.start(images).take(mask, Way(**way)).logits()


@pytest.mark.parametrize(
    ("channels", "kernel", "spacing", "groups"),
    [
        ((8, 16), (3, 3), 16, 1),
        pytest.param((20, 19), (3, 1), 32, 1, marks=pytest.mark.slow),
        pytest.param((3, 5), (5, 5), 16, 1, marks=pytest.mark.slow),
        ((24, 24), (3, 3), 48, 24),
    ],
    ids=["3x3", "odd channels, 3x1", "5x5", "depthwise"],
)
@torch.no_grad()
def test_a_full_mask_is_a_plain_convolution(
    channels: tuple[int, int], kernel: tuple[int, int], spacing: int, groups: int, device: str
) -> None:
    """All extra sites of a level, of several programs of a kernel, against F.conv2d in float64."""
    (inner, outer), (height, width) = channels, (10, 14)
    plan, generator = LevelPlan(2, (8 * height, 8 * width), 8, device), torch.Generator().manual_seed(0)
    level = Level(plan, torch.arange(plan.cells, device=device))
    grid = torch.randn(2, inner, height, width, generator=generator).to(device)
    weight = torch.randn(outer, inner // groups, *kernel, generator=generator).to(device)
    bias, apart = torch.randn(outer, generator=generator).to(device), spacing // 8
    padding = tuple(apart * (one // 2) for one in kernel)
    dense = F.conv2d(grid.double(), weight.double(), bias.double(), 1, padding, apart, groups)
    places = plan.fine_of_phases[1:].reshape(-1)
    expected = dense.permute(0, 2, 3, 1).flatten(0, 2)[places].float()
    rows = grid.permute(0, 2, 3, 1).flatten(0, 2)
    axes = ([spacing * (tap - one // 2) for tap in range(one)] for one in kernel)
    window = Taps(*map(tuple, axes))
    index = level.tap_rows(window)
    source = grid[:, :, ::2, ::2].permute(0, 2, 3, 1).flatten(0, 2)
    by_rows = triton.conv2d(rows, level.grid_rows(window, 8), weight, bias)
    by_level = triton.conv2d(rows[places], index, weight, bias, source, level)
    for found in (by_rows, by_level):
        assert found is not None
        assert relative_error(found, expected) < 1e-6


@torch.no_grad()
def test_the_static_form(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph of it runs the kernel, which reads no shape from a mask."""
    model, original, calls = selective(trained(), size=(64, 64)), triton.conv2d, []
    options = ExportOptions((33, 47), 2, None, 0.3, given=True, logits=True, ghosts=False, tiles=False)

    def count(*args: Any) -> Tensor | None:
        calls.append(original(*args))
        return calls[-1]

    monkeypatch.setattr(triton, "conv2d", count)
    gathered = StaticNetwork(model, options).to(device)
    assert not calls
    model.settings = dataclasses.replace(model.settings, engine="triton")
    network = StaticNetwork(model, options).to(device)
    images, *blocks = (one.to(device) for one in network.example())
    images = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)).to(device)
    calls.clear()
    assert relative_error(network(images, *blocks)[-1], gathered(images, *blocks)[-1]) < 1e-5
    assert len(calls) == 3  # the windows on an early value and on rows
    assert all(one is not None for one in calls)


@pytest.mark.parametrize("kind", ["lite", pytest.param("resnet34", marks=pytest.mark.slow)])
@torch.no_grad()
def test_sums_and_activations_are_part_of_the_kernel(
    kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all extra sites behind convolutions: in the static form, and in a pass that refines."""
    model, original, ends = kind_model(kind), triton.conv2d, list[Epilogue]()
    options = ExportOptions((64, 96), 1, None, 0.3, logits=True, ghosts=False, tiles=False)
    gathered = StaticNetwork(model, options).to(device)
    fused = copy.copy(gathered)
    fused.engine = "triton"
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)).to(device)

    def note(*args: Any) -> Tensor | None:
        ends.append(args[6])
        return original(*args)

    monkeypatch.setattr(triton, "conv2d", note)
    assert relative_error(fused(images)[-1], gathered(images)[-1]) < 1e-5
    nodes = gathered.geometry.of_kind("rows")
    assert len([end for end in ends if end.residual is not None]) == len([n for n in nodes if n.op == "add"])
    assert len([end for end in ends if end.low == 0]) == len([n for n in nodes if n.op == "relu"]) > 3
    model, mask = model.for_inference().to(device), torch.rand(1, 4, 6) < 0.5
    passes = [model.start(images).start_coarse().take(mask, Way(engine=one)) for one in ("triton", "gather")]
    assert relative_error(*(one.logits() for one in passes)) < 1e-5
    assert passes[0].macs() == passes[1].macs()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("splits", [1, 2, 5])
@torch.no_grad()
def test_split_channels(splits: int, dtype: torch.dtype, tolerance: float, device: str) -> None:
    """The same each time; a split of five has no channels. Bias, sum and bounds come at the end."""
    from sparse_seg.sites import implicit_gemm

    generator, shapes = torch.Generator().manual_seed(0), ((50, 64), (24, 64, 3, 1), (24,), (37, 24))
    drawn = (torch.randn(*shape, generator=generator) for shape in shapes)
    rows, weight, bias, residual = (one.to(device, dtype) for one in drawn)
    index = torch.randint(0, 51, (37 * 3,), generator=generator).to(device)  # 50 is outside
    residual[0, 0] = torch.nan
    end = Epilogue(residual, -1.0, 6.0)
    tile = implicit_gemm.Tile(16, 16, 16 * rows.element_size(), 4, 1, splits)
    given = rows, index, weight, bias, rows, None, False, end, tile
    found = [implicit_gemm.conv2d(*given) for _ in range(2)]
    read = torch.cat([rows, rows.new_zeros(1, 64)])[index].double().reshape(37, 3, 64)
    expected = end(torch.einsum("mti,oit->mo", read, weight.double().flatten(2)) + bias)
    assert torch.allclose(found[0].double(), expected, rtol=tolerance, atol=6 * tolerance, equal_nan=True)
    assert torch.allclose(found[0], found[1], rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_an_empty_mask(device: str) -> None:
    assert Case("triton", device=device, fraction=0.0).found().shape == (0, 16)
    model, images = selective(trained(), size=(64, 64)).to(device), torch.randn(1, 3, 64, 64).to(device)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert relative_error(run(model, images, mask, engine="triton"), run(model, images, mask)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    """As near to float64 as gather is: sums are float32, and so are ghosts."""
    case = Case("triton", (21, 18), device=device)
    case.grid, case.weight = case.grid.to(dtype), case.weight.to(dtype)
    gathered = case.conv(2, case.grid, case.weight)
    expected = case.conv(2, case.grid.double(), case.weight.double())
    found = case.found(2)
    assert found.dtype == dtype
    ours, theirs = ((one.double() - expected).abs().max() for one in (found, gathered))
    cut = device == "cpu" and dtype == torch.bfloat16  # interpreted, Triton cuts off where a GPU rounds
    assert ours < (2.2 if cut else 1.1) * theirs


def test_gradients_are_those_of_gather(device: str) -> None:
    model = selective(trained(), size=(64, 64)).to(device).train()
    images, mask = torch.randn(2, 3, 64, 96, device=device), torch.rand(2, 4, 6) < 0.5
    grads = []
    for engine in ("triton", "gather"):
        model.zero_grad()
        torch.manual_seed(0)  # of dropout
        run(model, images, mask, engine=engine).square().mean().backward()
        grads.append([one.grad for one in model.module.parameters() if one.grad is not None])
    assert len(grads[0]) > 5
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_other_groups_are_gathered(device: str) -> None:
    rows, index = torch.randn(9, 8, device=device), torch.arange(9, device=device)
    for weight in (torch.ones(16, 4, 1, 1, device=device), torch.ones(16, 1, 1, 1, device=device)):
        assert triton.conv2d(rows, index, weight) is None


@pytest.mark.slow
@torch.no_grad()
def test_the_fastest_tile_runs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is tried once for about as many sites; all give the same numbers."""
    from sparse_seg.sites import implicit_gemm

    among = implicit_gemm.Tile(64, 16, 64, 4, 2), implicit_gemm.Tile(16, 32, 64, 4, 2)
    monkeypatch.setattr(implicit_gemm, "tiles", lambda depthwise: among)
    tried = []

    def time(call: Any, **options: Any) -> float:
        call()
        tried.append(call.args[0])
        return 2.0 - tried.index(call.args[0])  # the second is the faster one

    monkeypatch.setattr(implicit_gemm, "do_bench", time)
    case = Case("triton", device=device)
    found = [case.found(), case.found()]
    assert tuple(tried) == among
    assert list(implicit_gemm._fastest.values()) == [among[1]]
    for one in found:
        assert relative_error(one, case.expected()) < 1e-5
