"""SiteLayout against loops over cells."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_seg.sparse import SiteLayout
from tests.reference import block_mask
from tests.slow_reference import SlowSites

SIZES = [(5, 7), (6, 9), (1, 1), (2, 3), (8, 8), (9, 4)]


def random_splits(size: tuple[int, int], levels: int, seed: int, batch: int = 2) -> list[Tensor]:
    """Random splits, coarsest first, of cells that have a site."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [size]
    for _ in range(levels):
        sizes.insert(0, (-(-sizes[0][0] // 2), -(-sizes[0][1] // 2)))
    splits: list[Tensor] = []
    has_site = torch.ones(batch, *sizes[0], dtype=torch.bool)
    for coarse, fine in itertools.pairwise(sizes):
        split = has_site & (torch.rand(batch, *coarse, generator=generator) < 0.5)
        splits.append(split)
        below = split.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, : fine[0], : fine[1]].clone()
        below[:, ::2, ::2] |= has_site
        has_site = below
    return splits


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_loops(size: tuple[int, int], levels: int) -> None:
    """Row order, sites, owners, areas, images and interpolation of every cell."""
    splits = random_splits(size, levels, seed=3)
    layout, slow = SiteLayout(2, size, 8, splits), SlowSites(2, size, splits)
    height, width = size
    cells = [(b, y, x) for b in range(2) for y in range(height) for x in range(width)]

    assert layout.cells.tolist() == [(b * height + y) * width + x for b, y, x in slow.cells]
    assert layout.num_sites == len(slow.cells)
    assert layout.num_extra == layout.num_sites - layout.num_lattice
    assert layout.num_lattice == 2 * layout.lattice_size[0] * layout.lattice_size[1]
    assert layout.lattice_stride == 8 * 2**levels
    assert layout.site.flatten().tolist() == [slow.rows_of[-1].get(cell, -1) for cell in cells]
    assert layout.owner.flatten().tolist() == [slow.owner(cell) for cell in cells]
    assert layout.image_of_row.tolist() == [b for b, _, _ in slow.cells]
    for cell, rows in zip(cells, layout.interpolation.tolist(), strict=True):
        weights = {row: rows.count(row) / len(rows) for row in rows}
        assert weights == slow.bilinear(cell), cell


def test_row_order_of_one_fine_block() -> None:
    """The documented order, spelled out: lattice row-major, then a fine block's phases 1, 2, 3."""
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    mask[0, 0, 1] = mask[0, 1, 0] = True
    layout = SiteLayout.from_fine_blocks(mask, (4, 3))
    #  lattice (0,0) (0,2) (2,0) (2,2); block (0,1) has a lower cell only; block (1,0) has all four
    assert layout.cells.tolist() == [0, 2, 6, 8, 5, 7, 9, 10]
    assert layout.site[0].tolist() == [[0, -1, 1], [-1, -1, 4], [2, 5, 3], [6, 7, -1]]
    assert layout.owner[0].tolist() == [[0, 0, 1], [0, 0, 4], [2, 5, 3], [6, 7, 3]]
    assert layout.areas.tolist() == [4, 1, 1, 4, 1, 1, 1, 1]


@pytest.mark.parametrize("levels", [0, 1, 2, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_areas(size: tuple[int, int], levels: int) -> None:
    """A site's area is 4 to the number of levels below the last at which its cell was split or born."""
    splits = random_splits(size, levels, seed=7)
    layout, slow = SiteLayout(2, size, 8, splits), SlowSites(2, size, splits)
    for (b, y, x), area in zip(slow.cells, layout.areas.tolist(), strict=True):
        expected = 4**levels
        for level, split in enumerate(splits, start=1):
            step = 2 ** (levels - level + 1)  # a cell of the split's grid, in finest cells
            if split[b, y // step, x // step]:
                expected = 4 ** (levels - level)
        assert area == expected, (b, y, x)


@settings(max_examples=30)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    levels=st.integers(1, 2),
    seed=st.integers(0, 999),
    spacing=st.sampled_from([8, 16, 32]),
    exchange=st.sampled_from(["linear", "nearest", "none"]),
)
def test_neighbour_table(size: tuple[int, int], levels: int, seed: int, spacing: int, exchange: str) -> None:
    """Reading any rows through the table gives the rebuilt grid at the nine places, zero outside."""
    splits = random_splits(size, levels, seed)
    layout, slow = SiteLayout(2, size, 8, splits), SlowSites(2, size, splits)
    table = layout.neighbours(layout, spacing, exchange)
    rows = torch.randn(
        layout.num_sites, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    grid = slow.rebuild(rows, exchange)[:, 0]

    ghosts = torch.cat((rows[:, 0][table.ghosts].mean(1), rows.new_zeros(1)))
    read = torch.cat((rows[:, 0], ghosts))[table.index.flatten()]
    expected = []
    for b, y, x in slow.cells[layout.num_lattice :]:
        for dy, dx in [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
            v, u = y + dy * spacing // 8, x + dx * spacing // 8
            inside = 0 <= v < size[0] and 0 <= u < size[1]
            expected.append(grid[b, v, u].item() if inside else 0.0)
    assert torch.allclose(read, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)
    ghosts_at = [grid[cell] for cell in zip(*_cells_of(table.ghost_cells, size), strict=True)]
    assert torch.allclose(ghosts[:-1], torch.stack([*ghosts_at, ghosts[-1]])[:-1], rtol=0, atol=1e-14)
    assert layout.neighbours(layout, spacing, exchange) is table, "tables are cached"


def _cells_of(flat: Tensor, size: tuple[int, int]) -> tuple[list[int], list[int], list[int]]:
    """(b, y, x) of flat cells."""
    b, y, x = torch.unravel_index(flat, (2, *size))
    return b.tolist(), y.tolist(), x.tolist()


def test_tables_of_one_layout_do_not_mix() -> None:
    """A cached table is that of its own exchange rule, spacing and destination."""
    splits = random_splits((9, 8), 1, seed=0)
    shared, dense = SiteLayout(2, (9, 8), 8, splits), SiteLayout(2, (9, 8), 8)
    cases = [(spacing, exchange) for exchange in ("linear", "none", "nearest") for spacing in (32, 16)]
    for _ in range(2):  # the second time all come from the cache
        for spacing, exchange in cases:
            table = shared.neighbours(shared, spacing, exchange)
            dense.neighbours(shared, spacing, exchange)
            fresh = SiteLayout(2, (9, 8), 8, splits)
            expected = fresh.neighbours(fresh, spacing, exchange)
            for name in ("index", "inside", "ghosts", "ghost_cells"):
                assert torch.equal(getattr(table, name), getattr(expected, name)), (exchange, spacing, name)


def test_rows_at() -> None:
    """What a strided 1x1 convolution reads: our row at each of the other layout's sites."""
    mask = block_mask("random", (2, 3, 4))
    dense = SiteLayout(2, (5, 7), 8)
    mixed = SiteLayout.from_fine_blocks(mask, (5, 7))
    coarse = SiteLayout(2, (3, 4), 16)
    assert dense.rows_at(dense) is None
    for src, dst, expected in ((dense, mixed, mixed.cells), (mixed, coarse, torch.arange(coarse.num_sites))):
        rows = src.rows_at(dst)
        assert rows is not None
        assert torch.equal(rows, expected)
    with pytest.raises(ValueError, match="sites that this stage's layout lacks"):
        SiteLayout.from_fine_blocks(torch.zeros_like(mask), (5, 7)).rows_at(mixed)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 3, 3).bool(), r"must be bool \[2, 3, 4\], not torch.bool \[2, 3, 3\]"),
        (torch.zeros(2, 3, 4), r"must be bool \[2, 3, 4\], not torch.float32 \[2, 3, 4\]"),
        (torch.zeros(2, 3, 4, dtype=torch.uint8), "not torch.uint8"),
        (torch.zeros(2, 12).bool(), r"not torch.bool \[2, 12\]"),
    ],
)
def test_bad_masks(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SiteLayout(2, (5, 7), 8, (mask,))


def test_bad_batch() -> None:
    with pytest.raises(ValueError, match=r"must be bool \[1, 3, 4\]"):
        SiteLayout(1, (5, 7), 8, (torch.zeros(2, 3, 4).bool(),))


def test_a_split_of_a_cell_without_site() -> None:
    coarse, middle = torch.zeros(1, 2, 2).bool(), torch.zeros(1, 3, 4).bool()
    middle[0, 0, 2] = True  # an even place: the coarse cell's own site
    SiteLayout(1, (5, 7), 8, (coarse, middle))
    middle[0, 1, 0] = True
    with pytest.raises(ValueError, match="splits a cell that has no site"):
        SiteLayout(1, (5, 7), 8, (coarse, middle))


def test_bad_neighbours() -> None:
    mixed = SiteLayout.from_fine_blocks(block_mask("checkerboard", (2, 3, 4)), (5, 7))
    with pytest.raises(ValueError, match="unknown exchange 'linaer'; choose one of linear, nearest, none"):
        mixed.neighbours(mixed, 16, "linaer")
    with pytest.raises(ValueError, match="spacing of 12 px is no multiple of the stride 8"):
        mixed.neighbours(mixed, 12)
    with pytest.raises(ValueError, match="differ in their finest grid"):
        SiteLayout(2, (6, 7), 8).neighbours(mixed, 16)


def test_device(device: str) -> None:
    mask = block_mask("random", (2, 3, 4)).to(device)
    layout = SiteLayout.from_fine_blocks(mask, (5, 7))
    table = layout.neighbours(layout, 16)
    tensors = [
        layout.cells,
        layout.site,
        layout.owner,
        layout.areas,
        layout.interpolation,
        table.index,
        table.ghosts,
        table.ghost_cells,
    ]
    assert {tensor.device.type for tensor in tensors} == {device}
