"""Fixtures of the tests of exported networks."""

import pytest

from sparse_seg.export import cuda_graph


@pytest.fixture
def replayed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs on the CPU: what would be captured runs as it is."""
    monkeypatch.setattr(cuda_graph, "check_device", lambda device: None)
    monkeypatch.setattr(cuda_graph, "graphed", lambda module, *example: module)
