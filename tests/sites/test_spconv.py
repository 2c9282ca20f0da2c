"""How the spconv engine calls the library, and when it refuses: one line then says what to do."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_seg import selective
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way
from sparse_seg.sites import EXCHANGES, EngineError, spconv
from tests.captured import trained
from tests.reference import block_mask, relative_error
from tests.sites.rows import Case

pytestmark = pytest.mark.skipif(importlib.util.find_spec("spconv") is None, reason="spconv is optional")


def with_library(test: Any) -> Any:
    """Slow: its import takes as long as fifty tests."""
    return pytest.mark.slow(pytest.mark.usefixtures("imported")(test))


def run(model: SelectiveNetwork, images: Tensor, mask: Tensor, **way: Any) -> Tensor:
    return model.start(images).take(mask, Way(**way)).logits()


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


@with_library
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


@with_library
@pytest.mark.parametrize("needed", ["grid", "weight"])
def test_no_training_on_the_cpu(needed: str) -> None:
    case = Case("spconv")
    getattr(case, needed).requires_grad_()
    with pytest.raises(EngineError, match=r"no gradients on the CPU.*engine: gather") as caught:
        case.found()
    assert "\n" not in str(caught.value)


@with_library
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

    assert not engine._outcome(device)[1]
    monkeypatch.setattr(spconv.pytorch.ops, name, count)
    first, second = (Case("spconv", device=device, fraction=one) for one in (0.35, "last"))
    with torch.no_grad():
        for case in (first, second, first):
            for window in (1, 1, 2):
                for channels in ((8, 16), (16, 8)):
                    case.weight = Case("spconv", channels=channels, device=device).weight
                    case.grid = case.grid[:, :1].expand(-1, channels[0], -1, -1)
                    case.found(window)
    assert len(found) == 4
    rim = first.level.rim([first.taps(1)])
    inside = first.level.plan.inside.cpu()
    assert found[0] == first.level.num_run + int(inside[:, rim.cpu()].sum())


@with_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_dtypes_that_it_cannot_run(dtype: torch.dtype, device: str) -> None:
    case = Case("spconv", device=device)
    case.grid, case.weight = case.grid.to(dtype), case.weight.to(dtype)
    with pytest.raises(EngineError, match=rf"cannot run {dtype}.*engine: gather"):
        case.found()


# -- refused ---------------------------------------------------------------------------------------------


def refused(device: str = "cpu") -> str:
    """The one line said when spconv is asked for."""
    messages = []
    for _ in range(2):
        with torch.no_grad(), pytest.raises(EngineError) as caught:
            Case("spconv", device=device).found()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert messages[0].endswith("or set engine: gather")
    assert "pip install spconv-cu12" in messages[0]
    assert spconv._outcome(device)[1]
    return messages[0]


def _scaled(by: float) -> Any:
    """A layer's forward that is wrong."""
    from spconv.pytorch import SubMConv2d

    original = SubMConv2d.forward
    return lambda self, places: (out := original(self, places)).replace_feature(out.features * by)


def _raising(error: Exception) -> Any:
    def fail(*_: Any) -> Any:
        raise error

    return fail


FORWARD = "spconv.pytorch.SubMConv2d.forward"
REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "wrong": (FORWARD, lambda: _scaled(1.01), "the installed spconv computes wrong numbers on"),
    "nan": (FORWARD, lambda: _scaled(float("nan")), "wrong numbers on cpu (relative error nan)"),
    # on one thread its numbers are right, so the check of numbers alone would let it pass
    "CPU-only": ("spconv.pytorch.ops.CPU_ONLY_BUILD", lambda: True, "the CPU-only build of spconv computes"),
    "failing": (
        FORWARD,
        lambda: _raising(RuntimeError("no kernel image is available\nfor this device")),
        "spconv fails on cpu (no kernel image is available)",
    ),
}


@with_library
@pytest.mark.parametrize("what", REFUSED)
def test_a_broken_library_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    name, make, message = REFUSED[what]
    monkeypatch.setattr(name, make())
    assert message in refused()


def test_a_mismatched_library_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    error = ImportError("libcudart.so.12: cannot open shared object file\nand more")
    monkeypatch.setattr(spconv, "_import", _raising(error))
    assert "spconv cannot be imported (libcudart.so.12: cannot open shared object file)" in refused()


def test_a_missing_library_is_refused(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("spconv.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "spconv", None)
    assert refused().startswith("spconv is not installed; for Python ")


@pytest.mark.parametrize(
    ("python", "cuda", "message"),
    [
        ((3, 10), "12.1", "for Python 3.10 and CUDA 12.1: pip uninstall .* pip install spconv-cu120==2.3.6"),
        ((3, 11), None, "for Python 3.11 without CUDA: pip uninstall .* pip install spconv-cu120==2.3.6"),
        ((3, 12), "12.6", "for Python 3.12 and CUDA 12.6: pip uninstall .* pip install spconv-cu126==2.3.8"),
        ((3, 13), None, "pip install spconv-cu126==2.3.8; or set engine: gather"),
        ((3, 14), None, "there is no wheel for Python 3.14 without CUDA: set engine: gather"),
    ],
)
def test_how_to_install_it(python: tuple[int, int], cuda: str | None, message: str) -> None:
    assert re.search(message, spconv._how_to_install(python, cuda))
