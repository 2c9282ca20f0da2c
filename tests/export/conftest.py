"""Fixtures of the tests of exported networks."""

import pytest
import torch

from sparse_seg.export import StaticNetwork, cuda_graph, onnx_segmentor, to_onnx
from sparse_seg.sites import Level


@pytest.fixture
def replayed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs on the CPU: what would be captured runs as it is, and sites read what they read on CUDA."""
    monkeypatch.setattr(Level, "sums_rows", False)
    monkeypatch.setattr(cuda_graph, "check_device", lambda device: None)
    monkeypatch.setattr(cuda_graph, "graphed", lambda module, *example: module)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[StaticNetwork]:
    """The networks of which graphs are made from here on."""
    networks = []

    def noted(network: StaticNetwork) -> object:
        networks.append(network)
        return to_onnx(network)

    monkeypatch.setattr(onnx_segmentor, "to_onnx", noted)
    return networks


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
