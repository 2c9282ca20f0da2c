"""Densify against brute-force interpolation, and the views between grids and rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_seg.sparse import SiteLayout, densify, grid_to_rows, lattice_grid, rows_to_grid
from tests.reference import block_mask, relative_error
from tests.slow_reference import SlowSites
from tests.sparse.test_layout import random_splits


@pytest.mark.parametrize("levels", [0, 1, 2])
@settings(max_examples=15)
@given(size=st.tuples(st.integers(1, 12), st.integers(1, 12)), seed=st.integers(0, 999))
def test_against_brute_force(levels: int, size: tuple[int, int], seed: int) -> None:
    """Values and gradients; and densify and the layout's interpolation follow one rule."""
    splits = random_splits(size, levels, seed)
    layout, slow = SiteLayout(2, size, 8, splits), SlowSites(2, size, splits)
    rows = torch.randn(layout.num_sites, 3, dtype=torch.float64, requires_grad=True)
    grid = densify(rows, layout)
    expected = slow.rebuild(rows, "linear")
    assert relative_error(grid, expected) < 1e-12
    assert grid.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(grid_to_rows(grid), rows[layout.interpolation].mean(1)) < 1e-12

    target = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(g, rows, target)[0] for g in (grid, expected))
    assert relative_error(ours, theirs) < 1e-12


def test_gradcheck(device: str) -> None:
    splits = [split.to(device) for split in random_splits((5, 6), 2, 0, batch=1)]
    layout = SiteLayout(1, (5, 6), 8, splits)
    rows = torch.randn(layout.num_sites, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: densify(rows, layout), (rows,))


@pytest.mark.parametrize("size", [(5, 7), (6, 4), (1, 1)], ids=str)
def test_all_fine_is_a_permutation(size: tuple[int, int]) -> None:
    layout = SiteLayout.from_fine_blocks(block_mask("full", (2, -(-size[0] // 2), -(-size[1] // 2))), size)
    rows = torch.randn(layout.num_sites, 4)
    grid = densify(rows, layout)
    assert torch.equal(grid_to_rows(grid)[layout.cells], rows)
    assert torch.equal(layout.cells.sort().values, torch.arange(2 * size[0] * size[1]))


def test_sites_keep_their_values() -> None:
    """Bit for bit, in float32 too."""
    layout = SiteLayout.from_fine_blocks(block_mask("random", (2, 6, 5)), (11, 10))
    rows = torch.randn(layout.num_sites, 3)
    assert torch.equal(grid_to_rows(densify(rows, layout))[layout.cells], rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    mask = block_mask("random", (2, 6, 5)).to(device)
    layout = SiteLayout.from_fine_blocks(mask, (11, 10))
    rows = torch.randn(layout.num_sites, 3, device=device).to(dtype)
    with torch.autocast(device, dtype):
        grid = densify(rows, layout)
    assert relative_error(grid.double(), densify(rows.double(), layout)) < 0.01


def test_views() -> None:
    """No copies where memory allows: writing to the rows shows in the grids."""
    layout = SiteLayout.from_fine_blocks(block_mask("random", (2, 3, 4)), (5, 7))
    rows = torch.randn(layout.num_sites, 3)
    lattice = lattice_grid(rows, layout)
    assert lattice.shape == (2, 3, 3, 4)
    assert lattice.data_ptr() == rows.data_ptr()
    assert lattice.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(lattice[1, :, 2, 3], rows[1 * 12 + 2 * 4 + 3])
    grid = rows_to_grid(rows[:24], 2, (3, 4))
    assert grid_to_rows(grid).data_ptr() == rows.data_ptr()
    assert torch.equal(grid_to_rows(grid.contiguous()), rows[:24])
