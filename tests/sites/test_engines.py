"""Engines spconv and triton against a slow reference and gather; on the CPU Triton interprets its kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sparse_seg import selective
from sparse_seg.run.way import Way
from sparse_seg.sites import EXCHANGES, SEPARATE, spconv, triton
from tests.captured import trained
from tests.reference import relative_error
from tests.sites.rows import Case

pytestmark = pytest.mark.slow  # spconv is imported, Triton's kernels are interpreted

WINDOWS = (1, 2, 18)  # as layer3's, layer4's, and the widest of ASPP's
RULES = ("linear", "nearest", "none")  # of a lone level; `separate` is that of networks


@pytest.mark.parametrize("size", [(9, 13), (1, 1), (21, 18)])
@torch.no_grad()
def test_a_level_equals_a_slow_reference(size: tuple[int, int], engine: str, device: str) -> None:
    """Also beyond the border of odd sizes; and the rules differ, else agreement would prove nothing."""
    found = []
    for exchange in RULES:
        for fraction in ("last", 0.35):
            case = Case(engine, size, exchange, device, fraction)
            for window in WINDOWS:
                assert relative_error(case.found(window), case.expected(window)) < 1e-5, (fraction, window)
        found.append(case.found())
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert size == (1, 1) or relative_error(found[first], found[second]) > 1e-2


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("strides", [(8, 16), (8, 16, 32)], ids=str)
@torch.no_grad()
def test_networks_equal_gather(
    strides: tuple[int, ...], exchange: str, engine: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows on early values, lattices under `separate`, and later steps included."""
    model = selective(trained(), strides, size=(64, 64)).to(device)
    images = torch.randn(2, 3, 101, 137, generator=torch.Generator().manual_seed(1)).to(device)
    shape = 2, -(-101 // strides[-1]), -(-137 // strides[-1])
    levels = torch.randint(0, len(strides), shape, generator=torch.Generator().manual_seed(2))
    called, calls = (spconv, "_submanifold") if engine == "spconv" else (triton, "conv2d"), list[Any]()
    original = getattr(*called)

    def count(*args: Any, **options: Any) -> Any:
        calls.append(original(*args, **options))
        assert calls[-1] is not None
        return calls[-1]

    monkeypatch.setattr(*called, count)
    way = Way(exchange=exchange, engine=engine)
    expected = model.start(images).take(levels, Way(exchange=exchange)).logits()
    assert not calls
    found = model.start(images).take(levels, way).logits()
    assert relative_error(found, expected) < 1e-5
    once = len(calls)
    if engine == "spconv":
        # two windows at each level, and at the lattice; with three strides those of the first one, which
        # reads a lattice at 16 px, are gathered at 16 and 32 px
        assert once == {2: (2, 4), 3: (3, 4)}[len(strides)][exchange == SEPARATE]
    model.settings = dataclasses.replace(model.settings, engine=engine)
    assert torch.equal(model.start(images).take(levels, Way(exchange=exchange)).logits(), found)
    if exchange == SEPARATE:
        return
    first, by_steps = levels.where(torch.arange(shape[2]) % 2 == 0, 0), []
    for one in (way, Way(exchange=exchange, engine="gather")):
        by_steps.append(model.start(images).start_coarse().take(first, one).take(levels, one).logits())
    assert relative_error(*by_steps) < 1e-5


@torch.no_grad()
def test_autocast(engine: str, device: str) -> None:
    case = Case(engine, (21, 18), device=device)
    dtype, tolerance = (torch.float16, 0.004) if engine == "spconv" else (torch.bfloat16, 0.02)
    expected = case.expected()
    with torch.autocast(device, dtype):
        halves = [case.found(), case.found(bias=torch.ones(16, device=device)) - 1]
        case.grid = case.grid.to(dtype)  # a layer before it may have cast
        halves.append(case.found())
    for half in halves:
        assert half.dtype == dtype
        assert relative_error(half.float(), expected) < tolerance
    assert Case(engine, device=device).found().dtype == torch.float32


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (Way(engine="cuda"), "unknown engine 'cuda'; choose one of auto, gather, spconv, triton"),
        (Way(exchange="linaer"), "unknown exchange 'linaer'; did you mean 'linear'"),
        (Way(merge="pach"), "unknown merge 'pach'; did you mean 'patch'"),
    ],
)
def test_an_unknown_engine_exchange_or_merge(way: Way, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selective(trained(), size=(64, 64)).check_way(way)
