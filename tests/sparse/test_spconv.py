"""The spconv engine against the gather engine, and the guards against what spconv does in silence."""

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.sparse import EXCHANGES, EngineError, SelectiveConv2d, SiteLayout
from sparse_seg.sparse.engines import gather, spconv
from tests.reference import MASKS, block_mask, random_model, relative_error
from tests.sparse.test_conv import on_device
from tests.sparse.test_layout import random_splits

pytestmark = pytest.mark.skipif(importlib.util.find_spec("spconv") is None, reason="spconv is optional")

SIZES = [(1, 1), (4, 6), (9, 13), (21, 18)]  # of the finest grid, at stride 8
SPACINGS = (16, 32, 96, 192, 288)  # layer3, layer4, and ASPP's


@pytest.fixture(autouse=True)
def imported() -> None:
    """Its first import warns of what it uses; tests that import it themselves must not be the first."""
    spconv.available("cpu")


@pytest.fixture
def fresh() -> Iterator[None]:
    """What the engine found out about the library is forgotten before and after."""

    def forget() -> None:
        spconv._outcome.cache_clear()
        spconv._layer.cache_clear()

    forget()
    yield
    forget()


def two_levels(kind: str, size: tuple[int, int], device: str, batch: int = 2) -> SiteLayout:
    mask = block_mask(kind, (batch, -(-size[0] // 2), -(-size[1] // 2)))
    return SiteLayout.from_fine_blocks(mask.to(device), size)


def tensors(layout: SiteLayout, inside: int = 8, outside: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(layout.num_sites, inside, generator=generator)
    weight = torch.randn(outside, 3, 3, inside, generator=generator)
    return rows.to(layout.device), weight.to(layout.device)


def both(
    layout: SiteLayout, spacing: int, exchange: str, rows: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    ours = spconv.selective_conv2d(rows, weight, layout, layout, spacing, exchange)
    return ours, gather.selective_conv2d(rows, weight, layout, layout, spacing, exchange)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
@torch.no_grad()
def test_equals_gather(kind: str, size: tuple[int, int], exchange: str, device: str) -> None:
    layout = two_levels(kind, size, device)
    for spacing in SPACINGS:
        ours, theirs = both(layout, spacing, exchange, *tensors(layout))
        assert relative_error(ours, theirs) < 1e-5, spacing


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_three_levels_equal_gather(seed: int, exchange: str, device: str) -> None:
    size = [(9, 13), (16, 8), (5, 7), (3, 30)][seed]
    layout = on_device(SiteLayout(2, size, 8, random_splits(size, 2, seed)), device)
    assert layout.num_extra > 0
    for spacing in (32, 64, 96):
        ours, theirs = both(layout, spacing, exchange, *tensors(layout))
        assert relative_error(ours, theirs) < 1e-5, spacing
    with pytest.raises(ValueError, match="taps 16 px apart do not fall on a lattice of stride 32"):
        both(layout, 16, exchange, *tensors(layout))


@torch.no_grad()
def test_exchange_rules_differ() -> None:
    """Otherwise agreement would prove nothing."""
    layout = two_levels("random", (9, 13), "cpu")
    results = [both(layout, 16, exchange, *tensors(layout))[0] for exchange in EXCHANGES]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert relative_error(results[first], results[second]) > 1e-2


def test_wrong_number_of_rows() -> None:
    layout = two_levels("random", (9, 13), "cpu")
    rows, weight = tensors(layout)
    with pytest.raises(ValueError, match="rows given for a layout of"):
        spconv.selective_conv2d(rows[1:], weight, layout, layout, 16, "linear")


def with_engine(model: SelectiveNetwork, engine: str) -> SelectiveNetwork:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, SelectiveConv2d):
            module.engine = engine
    return model


@pytest.mark.slow
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize(("backbone", "head"), [("resnet18", "lite"), ("resnet50", "deeplabv3")])
@torch.no_grad()
def test_networks_equal_gather(backbone: str, head: str, exchange: str, device: str) -> None:
    """Entry convolutions included (both engines run those by gather)."""
    model = random_model(backbone, head, device=device, exchange=exchange)
    images = torch.randn(2, 3, 101, 137, generator=torch.Generator().manual_seed(1)).to(device)
    logits = [
        with_engine(model, engine)(images, fine_blocks=block_mask("random", (2, 7, 9)).to(device))
        for engine in ("spconv", "gather")
    ]
    assert relative_error(*logits) < 1e-5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("eval_first", [False, True])
def test_gradients_equal_gather(exchange: str, eval_first: bool) -> None:
    """Also where the layout's index pairs were first found without gradients."""
    layout = two_levels("random", (21, 18), "cuda")
    if eval_first:
        with torch.no_grad():
            both(layout, 16, exchange, *tensors(layout))
    results = []
    for engine in (spconv, gather):
        rows, weight = (tensor.requires_grad_() for tensor in tensors(layout))
        out = engine.selective_conv2d(rows, weight, layout, layout, 16, exchange)
        out.backward(torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out))
        results.append((out.detach(), rows.grad, weight.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None
        assert theirs is not None
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("needed", ["rows", "weight"])
def test_no_training_on_the_cpu(needed: str) -> None:
    layout = two_levels("random", (9, 13), "cpu")
    rows, weight = tensors(layout)
    (rows if needed == "rows" else weight).requires_grad_()
    with pytest.raises(EngineError, match=r"no gradients on the CPU.*engine: gather") as caught:
        spconv.selective_conv2d(rows, weight, layout, layout, 16, "linear")
    assert "\n" not in str(caught.value)


def test_index_pairs_are_found_once(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Once per layout, spacing and exchange rule, whatever the channels; layouts do not mix."""
    import spconv.pytorch

    name = "get_indice_pairs" if device == "cpu" else "get_indice_pairs_implicit_gemm"
    found, original = [], getattr(spconv.pytorch.ops, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        found.append(args[0].shape[0])
        return original(*args, **kwargs)

    from sparse_seg.sparse.engines import spconv as engine

    assert engine.available(device)
    monkeypatch.setattr(spconv.pytorch.ops, name, count)
    first, second = (two_levels(kind, (9, 13), device) for kind in ("random", "one"))
    with torch.no_grad():
        for layout in (first, second, first):
            for spacing in (16, 16, 32):
                for channels in ((8, 16), (16, 8)):
                    ours, theirs = both(layout, spacing, "linear", *tensors(layout, *channels))
                    assert relative_error(ours, theirs) < 1e-5
    assert len(found) == 4
    table = first.neighbours(first, 16)
    assert found[0] == first.num_extra + table.ghost_cells.shape[0]


def test_the_layer_it_calls(fresh: None, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The weight is our memory, places are contiguous int32, no bias, and an algorithm the device has."""
    from spconv.pytorch import SubMConv2d

    assert spconv.available(device)
    calls, original = [], SubMConv2d.forward

    def spy(self: Any, places: Any) -> Any:
        calls.append((self, self.weight.data_ptr(), places))
        return original(self, places)

    monkeypatch.setattr(SubMConv2d, "forward", spy)
    layout = two_levels("random", (9, 13), device)
    conv = SelectiveConv2d(8, 16, 16, engine="spconv").to(device)
    state = torch.get_rng_state()
    with torch.no_grad():
        conv(tensors(layout)[0], layout, layout)
    assert torch.equal(torch.get_rng_state(), state), "a layer built on the way must not draw random numbers"
    ((layer, pointer, places),) = calls
    assert pointer == conv.weight.data_ptr()
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
    layout = two_levels("random", (21, 18), device)
    rows, weight = tensors(layout)
    full = gather.selective_conv2d(rows, weight, layout, layout, 16, "linear")
    with torch.autocast(device, torch.float16):
        halves = [
            spconv.selective_conv2d(given, weight, layout, layout, 16, "linear")
            for given in (rows, rows.half())  # a layer before it may have cast already
        ]
    for half in halves:
        assert half.dtype == torch.float16
        assert relative_error(half.float(), full) < 0.004
    assert both(layout, 16, "linear", *tensors(layout))[0].dtype == torch.float32
    with (
        torch.autocast(device, torch.bfloat16),
        pytest.raises(EngineError, match=r"cannot run torch\.bfloat16.*engine: gather"),
    ):
        spconv.selective_conv2d(rows, weight, layout, layout, 16, "linear")
    with pytest.raises(EngineError, match=r"cannot run torch\.float64"):
        spconv.selective_conv2d(rows.double(), weight.double(), layout, layout, 16, "linear")


def refused(device: str = "cpu") -> str:
    """The one line said when spconv is asked for; `auto` works all the same."""
    layout = two_levels("random", (9, 13), device)
    rows, weight = tensors(layout)
    messages = []
    for _ in range(2):
        with torch.no_grad(), pytest.raises(EngineError) as caught:
            spconv.selective_conv2d(rows, weight, layout, layout, 16, "linear")
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert messages[0].endswith("or set engine: gather")
    assert "pip install spconv-cu12" in messages[0]
    assert not spconv.available(device)
    assert not spconv.suits(torch.device(device), torch.float32)
    assert SelectiveConv2d(8, 16, 16).to(device)(rows, layout, layout).isfinite().all()
    return messages[0]


def test_wrong_numbers_are_refused(fresh: None, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    from spconv.pytorch import SubMConv2d

    original = SubMConv2d.forward

    def wrong(self: Any, places: Any) -> Any:
        out = original(self, places)
        return out.replace_feature(out.features * 1.01)

    monkeypatch.setattr(SubMConv2d, "forward", wrong)
    assert f"the installed spconv computes wrong numbers on {device}" in refused(device)


def test_not_a_number_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from spconv.pytorch import SubMConv2d

    original = SubMConv2d.forward
    monkeypatch.setattr(
        SubMConv2d, "forward", lambda self, p: p.replace_feature(original(self, p).features * float("nan"))
    )
    assert "computes wrong numbers on cpu (relative error nan)" in refused()


def test_the_cpu_only_build_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one thread its numbers are right, so the check of numbers alone would let it pass."""
    import spconv.pytorch

    monkeypatch.setattr(spconv.pytorch.ops, "CPU_ONLY_BUILD", True)
    assert "the CPU-only build of spconv computes wrong numbers" in refused()


def test_a_failing_library_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from spconv.pytorch import SubMConv2d

    def fail(self: Any, places: Any) -> Any:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(SubMConv2d, "forward", fail)
    assert "spconv fails on cpu (no kernel image is available)" in refused()


def test_a_mismatched_install_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("libcudart.so.12: cannot open shared object file\nand more")

    monkeypatch.setattr(spconv, "_import", fail)
    assert "spconv cannot be imported (libcudart.so.12: cannot open shared object file)" in refused()
