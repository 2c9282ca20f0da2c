"""The figures of docs/method.md show what the tables of a level hold."""

from pathlib import Path

import cv2
import pytest
import torch

from sparse_seg.lab.report import figures
from sparse_seg.lab.report.figures import ALL, FIGURES, Place, Tap, example_level, main, places, taps

DOCS = Path(__file__).parents[2] / "docs"
HEIGHT, WIDTH = figures.SIZE


def test_rows_stand_at_their_cells() -> None:
    """The lattice row by row, then each fine block's further cells, as far as they are inside."""
    lattice = [(x, y) for y in range(0, HEIGHT, 2) for x in range(0, WIDTH, 2)]
    extras = [
        (2 * x + right, 2 * y + down) for y, x in figures.FINE for down, right in ((0, 1), (1, 0), (1, 1))
    ]
    assert places(example_level()) == lattice + [(x, y) for x, y in extras if x < WIDTH and y < HEIGHT]


@pytest.mark.parametrize("exchange", ["linear", "nearest", "none"])
def test_taps_are_those_of_the_kernel_and_ghosts_those_of_the_rule(exchange: str) -> None:
    """Against the rules as the page words them."""
    level = example_level(exchange=exchange)
    at, seen = places(level), set()
    for row, (x, y) in enumerate(at):
        expected = []
        for v in range(y - 2, y + 3, 2):
            for u in range(x - 2, x + 3, 2):
                if not (0 <= u < WIDTH and 0 <= v < HEIGHT):
                    continue
                is_site = (u, v) in at
                rows = [at.index((u, v))] if is_site else [at.index(one) for one in ghost(u, v, exchange)]
                expected.append(Tap((u, v), not is_site, tuple(sorted(rows))))
                seen.add(len(rows))
        assert taps(level, row) == expected
    assert seen == {"linear": {1, 2, 4}, "nearest": {1}, "none": {0, 1}}[exchange]


def ghost(x: int, y: int, exchange: str) -> list[Place]:
    """The places of the lattice whose mean a ghost is."""
    if exchange == "none":
        return []
    if exchange == "nearest":
        return [(x - x % 2, y - y % 2)]
    around = {(u, v) for u in (x - x % 2, x + x % 2) for v in (y - y % 2, y + y % 2)}
    return [(u, v) for u, v in around if u < WIDTH and v < HEIGHT]


def test_both_strides_read_the_same_places_and_phases_never_mix() -> None:
    """What the figure of the phases claims, at every site."""
    coarse, fine = example_level(()), example_level(ALL)
    at = places(fine)
    assert len(at) == HEIGHT * WIDTH
    for row, place in enumerate(places(coarse)):
        assert [tap.place for tap in taps(fine, at.index(place))] == [tap.place for tap in taps(coarse, row)]
    for row, (x, y) in enumerate(at):
        assert {(u % 2, v % 2) for (u, v), *_ in taps(fine, row)} == {(x % 2, y % 2)}


def test_the_example_shows_every_case() -> None:
    """Sites at the rim of a fine region, fine blocks cut to two cells and to one, and all `linear` ghosts."""
    level = example_level()
    at = places(level)
    assert len(at) - level.plan.cells == 3 * 3 + 1  # of a block of two cells one is new, of one cell none
    for row in range(len(at)):
        for (x, y), is_ghost, rows in taps(level, row):
            if is_ghost:  # of odd size, the grid has sites on both sides of every ghost
                assert torch.tensor([at[source] for source in rows]).double().mean(0).tolist() == [x, y]
    two, four = (taps(level, at.index(place)) for place in ((5, 2), (5, 3)))
    assert [{len(tap.rows) for tap in read if tap.ghost} for read in (two, four)] == [{2}, {4}]
    assert all(any(not tap.ghost for tap in read) for read in (two, four))


@pytest.mark.slow
def test_all_are_written_and_those_of_the_page_are_all_there_are(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    main([str(tmp_path / "new")])
    page = (DOCS / "method.md").read_text()
    for name in FIGURES:
        picture = cv2.imread(str(tmp_path / "new" / f"{name}.png"))
        assert picture is not None
        assert picture.shape[1] >= 900
        assert picture.std() > 10  # not blank
        assert (tmp_path / "new" / f"{name}.png").stat().st_size < 120_000
        assert f"(figures/{name}.png)" in page
        assert (DOCS / f"figures/{name}.png").exists()
