"""The spconv engine against a slow reference, and what it is asked to run."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_seg import selective
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.sites import EXCHANGES, SEPARATE, EngineError, spconv
from tests.captured import trained
from tests.reference import block_mask, relative_error
from tests.sites.level_case import Case, taps

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("spconv") is None, reason="spconv is optional"),
    pytest.mark.usefixtures("imported"),
]

SIZES = [(1, 1), (4, 6), (9, 13), (21, 18)]  # of the level's own grid, at stride 8
SPACINGS = (16, 32, 96, 192, 288)  # layer3, layer4, and ASPP's
RULES = ("linear", "nearest", "none")  # of a lone level; `separate` is that of networks


def run(model: SelectiveNetwork, images: Tensor, mask: Tensor, **way: Any) -> Tensor:
    return model.start(images).take(mask, Way(**way)).logits()


@pytest.mark.slow
@pytest.mark.parametrize("exchange", RULES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["full", "random", "corner"])
@torch.no_grad()
def test_equals_a_slow_reference(kind: str, size: tuple[int, int], exchange: str, device: str) -> None:
    """Also beyond the border of odd sizes, where extra sites hold what no place may read."""
    case = Case(kind, size, exchange, device)
    for spacing in SPACINGS:
        assert relative_error(case.found(spacing), case.expected(spacing)) < 1e-5, spacing


@torch.no_grad()
def test_exchange_rules_differ() -> None:
    """Otherwise agreement would prove nothing."""
    results = [Case(exchange=exchange) for exchange in RULES]
    for case in results:
        assert relative_error(case.found(), case.expected()) < 1e-5
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert relative_error(results[first].found(), results[second].found()) > 1e-2


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("strides", [(8, 16), (8, 16, 32)], ids=str)
@torch.no_grad()
def test_networks_equal_gather(
    strides: tuple[int, ...], exchange: str, device: str, monkeypatch: Any
) -> None:
    """Lattices under `separate` included; windows on early values and steps are gathered by both."""
    model = selective(trained(), strides, size=(64, 64)).to(device)
    images = torch.randn(2, 3, 101, 137, generator=torch.Generator().manual_seed(1)).to(device)
    shape = 2, -(-101 // strides[-1]), -(-137 // strides[-1])
    levels = torch.randint(0, len(strides), shape, generator=torch.Generator().manual_seed(2))
    calls, original = [], spconv._submanifold

    def count(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[1])
        return original(*args, **kwargs)

    monkeypatch.setattr(spconv, "_submanifold", count)
    found, expected = (
        run(model, images, levels, exchange=exchange, engine=engine) for engine in ("spconv", "gather")
    )
    assert relative_error(found, expected) < 1e-5
    # two windows at each level, and at the lattice; with three strides those of the first one, which reads a
    # lattice at 16 px, are gathered at 16 and 32 px
    assert len(calls) == {2: (2, 4), 3: (3, 4)}[len(strides)][exchange == SEPARATE]
    model.settings = dataclasses.replace(model.settings, engine="spconv")
    assert torch.equal(run(model, images, levels, exchange=exchange), found)
    if exchange != SEPARATE:
        refined = model.start(images).start_coarse().take(levels, Way(exchange=exchange))
        assert relative_error(refined.logits(), expected) < 1e-5


def test_dense_networks_and_coarse_masks_have_nothing_for_it(fresh: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(spconv, "_outcome", lambda device: (None, "spconv is not installed"))
    model, images = selective(trained(), size=(64, 64)), torch.randn(1, 3, 64, 64)
    model.settings = dataclasses.replace(model.settings, engine="spconv")
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    with torch.no_grad():
        assert model.dense(images).isfinite().all()
        assert model(images, mask).isfinite().all()
        with pytest.raises(EngineError, match=r"^spconv is not installed; "):
            model(images, ~mask)
        assert run(model, images, ~mask, engine="auto").isfinite().all()


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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("eval_first", [False, True])
def test_gradients_equal_gather(exchange: str, eval_first: bool) -> None:
    """Also where the places' index pairs were first found without gradients."""
    model = selective(trained(), size=(64, 64)).cuda()
    images = torch.randn(2, 3, 101, 137, device="cuda")
    mask = block_mask("random", (2, 7, 9)).cuda()
    grads = []
    for engine in ("spconv", "gather"):
        way = {"exchange": exchange, "engine": engine}
        if eval_first:
            with torch.no_grad():
                run(model, images, mask, **way)
        model.zero_grad()
        logits = run(model, images, mask, **way)
        logits.backward(torch.linspace(-1, 1, logits.numel(), device="cuda").view_as(logits))
        grads.append([one.grad for one in model.module.parameters() if one.grad is not None])
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("needed", ["extras", "weight"])
def test_no_training_on_the_cpu(needed: str) -> None:
    case = Case()
    getattr(case, needed).requires_grad_()
    with pytest.raises(EngineError, match=r"no gradients on the CPU.*engine: gather") as caught:
        case.found()
    assert "\n" not in str(caught.value)


def test_index_pairs_are_found_once(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Once per level and window, whatever the channels; levels do not mix; of the sites inside the image and
    their rim."""
    import spconv.pytorch

    name = "get_indice_pairs" if device == "cpu" else "get_indice_pairs_implicit_gemm"
    found, original = [], getattr(spconv.pytorch.ops, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        found.append(args[0].shape[0])
        return original(*args, **kwargs)

    from sparse_seg.sites import spconv as engine

    assert engine.available(device)
    monkeypatch.setattr(spconv.pytorch.ops, name, count)
    first, second = (Case(kind, device=device) for kind in ("random", "one"))
    with torch.no_grad():
        for case in (first, second, first):
            for spacing in (16, 16, 32):
                for channels in ((8, 16), (16, 8)):
                    other = Case(channels=channels, device=device)
                    case.weight = other.weight
                    case.source = case.source[:, :1].expand(-1, channels[0])
                    case.extras = case.extras[:, :1].expand(-1, channels[0])
                    case.found(spacing)
    assert len(found) == 4
    rim = first.level.rim([taps(16)])
    inside = first.level.plan.inside.cpu()
    assert found[0] == first.level.num_run + int(inside[:, rim.cpu()].sum())


def test_the_layer_it_calls(fresh: None, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Its weight has no memory of its own, places are contiguous int32, and the device has the algorithm."""
    from spconv.pytorch import SubMConv2d

    assert spconv.available(device)
    calls, original = [], SubMConv2d.forward

    def spy(self: Any, places: Any) -> Any:
        calls.append((self, self.weight.data_ptr(), places))
        return original(self, places)

    monkeypatch.setattr(SubMConv2d, "forward", spy)
    case = Case(device=device)
    case.weight = case.weight.to(memory_format=torch.channels_last)
    state = torch.get_rng_state()
    with torch.no_grad():
        without, bias = case.found(), torch.ones(16, device=device)
        assert relative_error(case.found(bias=bias), without + 1) < 1e-6
    assert torch.equal(torch.get_rng_state(), state), "a layer built on the way must not draw random numbers"
    (layer, pointer, places), _ = calls
    assert pointer == case.weight.data_ptr(), "channels_last is spconv's own layout"
    assert layer.weight.is_meta, "no second copy, nor a reference to ours that keeps it alive"
    assert layer.bias is None
    assert places.indices.dtype == torch.int32
    assert places.indices.is_contiguous()
    assert places.features.is_contiguous()
    if device == "cpu":
        assert layer.algo.name == "Native"
        assert not layer.training


@torch.no_grad()
def test_autocast(device: str) -> None:
    case = Case(size=(21, 18), device=device)
    with torch.autocast(device, torch.float16):
        halves = [case.found()]
        case.source, case.extras = case.source.half(), case.extras.half()  # a layer before it may have cast
        halves.append(case.found())
    for half in halves:
        assert half.dtype == torch.float16
        assert relative_error(half.float(), case.expected()) < 0.004
    assert Case(device=device).found().dtype == torch.float32
    with (
        torch.autocast(device, torch.bfloat16),
        pytest.raises(EngineError, match=r"cannot run torch\.bfloat16.*engine: gather"),
    ):
        case.found()
    case.source, case.extras, case.weight = case.source.double(), case.extras.double(), case.weight.double()
    with pytest.raises(EngineError, match=r"cannot run torch\.float64"):
        case.found()
