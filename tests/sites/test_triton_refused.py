"""When gather runs in place of the triton engine: one warning says why, and the numbers are gather's."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_seg import selective
from sparse_seg.run.way import Way
from sparse_seg.sites import triton
from tests.captured import trained
from tests.sites.conftest import KERNELS, import_kernels

pytestmark = pytest.mark.usefixtures("unknown")
with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is optional")


@torch.no_grad()
def refused(dtype: torch.dtype = torch.float32) -> str:
    """The one line said when a network runs by the engine on the CPU; "" where none is."""
    model, images = selective(trained(), size=(64, 64)).to(dtype), torch.randn(1, 3, 64, 96, dtype=dtype)
    mask = torch.rand(1, 4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    found = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")  # of Triton's own
        warnings.simplefilter("default", triton.EngineWarning)
        for engine in ("triton", "triton", "gather"):
            found.append(model.start(images).take(mask, Way(exchange="none", engine=engine)).logits())
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])
    if not caught:
        return ""
    (message,) = {str(one.message) for one in caught}
    assert "\n" not in message
    assert message.startswith("engine triton: ")
    assert message.endswith("; gather runs")
    assert triton.problem(images.device, dtype) in message
    return message


def test_without_cuda_triton_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    import_kernels(monkeypatch)
    assert not refused(), "a config may serve both"
    assert KERNELS not in sys.modules
    assert triton.problem(torch.device("cpu"), torch.float32) == "it needs a CUDA device, not cpu"


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    import_kernels(monkeypatch)
    for name in [name for name in sys.modules if name.startswith("triton.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton is not installed (pip install triton)" in refused()


def test_a_dtype_that_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "it cannot run torch.float64" in refused(torch.float64)


@with_triton
@pytest.mark.parametrize("device", ["cpu"])
def test_wrong_numbers(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_seg.sites import implicit_gemm

    original = implicit_gemm.conv2d
    monkeypatch.setattr(implicit_gemm, "conv2d", lambda *args: original(*args) * 1.001)
    assert "it computes wrong numbers on cpu in torch.float32 (relative error 0.001)" in refused()


@with_triton
@pytest.mark.parametrize("device", ["cpu"])
@pytest.mark.parametrize("checks", [0, 1], ids=["in the check", "later"])
def test_a_kernel_that_fails(interpreted: None, checks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_seg.sites import implicit_gemm

    original, calls = implicit_gemm.conv2d, []

    def fail(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) <= checks:
            return original(*args)
        raise RuntimeError("no PTX for this device\nand more")

    monkeypatch.setattr(implicit_gemm, "conv2d", fail)
    assert "(no PTX for this device)" in refused()
    assert len(calls) == checks + 1


@with_triton
@pytest.mark.parametrize("device", ["cpu"])
@torch.no_grad()
def test_no_memory_is_no_reason_to_gather(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would need more."""
    from sparse_seg.sites import implicit_gemm

    def fail(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    rows, index, weight = torch.randn(9, 8), torch.arange(9), torch.randn(4, 8, 1, 1)
    assert triton.conv2d(rows, index, weight) is not None
    monkeypatch.setattr(implicit_gemm, "conv2d", fail)
    with pytest.raises(torch.OutOfMemoryError):
        triton.conv2d(rows, index, weight)
