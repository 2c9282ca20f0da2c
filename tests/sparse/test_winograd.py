"""Winograd's filtering against the plain convolution in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_seg.sparse import winograd
from sparse_seg.sparse.winograd import Workspace, transform_weight, winograd_conv2d
from tests.reference import relative_error


def random_case(size: tuple[int, int, int], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (*size, 5), (7, 3, 3, 5), (7,)
    grid, weight, bias = (torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes)
    return grid, weight, bias


def plain(grid: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    nchw, oihw = grid.double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2)
    return F.conv2d(nchw, oihw, bias.double(), 1, dilation, dilation).permute(0, 2, 3, 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 17), st.integers(1, 17)),
    dilation=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_against_the_plain_convolution(
    dtype: torch.dtype, tolerance: float, size: tuple[int, int, int], dilation: int, seed: int
) -> None:
    grid, weight, bias = random_case(size, dtype, seed)
    ours = winograd_conv2d(grid, transform_weight(weight), bias, dilation)
    assert ours.shape == (*size, 7)
    assert relative_error(ours, plain(grid, weight, bias, dilation)) < tolerance


def test_pieces_and_reused_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace that held larger and smaller work before, and work in many pieces, change nothing."""
    workspace = Workspace()
    for tiles, size in ((512, (2, 23, 30)), (4, (1, 9, 8)), (1, (2, 23, 30))):
        monkeypatch.setattr(winograd, "_TILES", tiles)
        grid, weight, bias = random_case(size, torch.float64, tiles)
        ours = winograd_conv2d(grid, transform_weight(weight), bias, 2, workspace)
        assert relative_error(ours, plain(grid, weight, bias, 2)) < 1e-13
