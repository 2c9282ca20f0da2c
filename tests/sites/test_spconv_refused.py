"""When the spconv engine refuses: a library that is missing, broken or wrong; one line says what to do."""

from __future__ import annotations

import importlib.util
import re
import sys
from typing import Any

import pytest
import torch

from sparse_seg.sites import EngineError, spconv
from tests.sites.level_case import Case

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("spconv") is None, reason="spconv is optional"),
    pytest.mark.usefixtures("imported"),
]


def refused(device: str = "cpu") -> str:
    """The one line said when spconv is asked for."""
    messages = []
    for _ in range(2):
        with torch.no_grad(), pytest.raises(EngineError) as caught:
            Case(device=device).found()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert messages[0].endswith("or set engine: gather")
    assert "pip install spconv-cu12" in messages[0]
    assert not spconv.available(device)
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
