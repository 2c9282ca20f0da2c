"""What tests of the engines share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import pytest

from sparse_seg.sites import spconv, triton

KERNELS = "sparse_seg.sites.implicit_gemm"


@pytest.fixture
def imported() -> None:
    """Its first import warns of what it uses; tests that import it themselves must not be the first."""
    spconv._outcome("cpu")


@pytest.fixture
def fresh() -> Iterator[None]:
    """What the engine found out about the library is forgotten before and after."""

    def forget() -> None:
        spconv._outcome.cache_clear()
        spconv._layer.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def interpreted(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU Triton's kernels are interpreted."""
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when a kernel is defined, at the file's import
    import_kernels(monkeypatch)


@pytest.fixture(params=["spconv", "triton"])
def engine(request: pytest.FixtureRequest, device: str) -> str:
    """An engine that may be missing."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is optional")
    request.getfixturevalue("imported" if request.param == "spconv" else "interpreted")
    return request.param


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of whether the triton engine works."""
    monkeypatch.setattr(triton, "_problems", {})


def import_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the kernels is imported anew by who needs it."""
    monkeypatch.delattr(KERNELS, raising=False)
    monkeypatch.delitem(sys.modules, KERNELS, raising=False)
