"""The figures of docs/method.md show what the layouts hold."""

from pathlib import Path

import cv2
import pytest
import torch

from sparse_seg.lab.report import figures
from sparse_seg.lab.report.figures import FIGURES, Tap, example_layout, main, places, taps
from sparse_seg.sparse import SiteLayout

DOCS = Path(__file__).parents[2] / "docs"


def test_rows_stand_at_their_cells() -> None:
    layout = example_layout()
    at = places(layout)
    assert len(set(at)) == layout.num_sites
    for row, (x, y) in enumerate(at):
        assert layout.site[0, y, x] == row
        assert (x % 2 == 0 and y % 2 == 0) == (row < layout.num_lattice)


@pytest.mark.parametrize("exchange", ["linear", "nearest", "none"])
def test_taps_are_those_of_the_kernel_and_ghosts_those_of_the_rule(exchange: str) -> None:
    """Against the layout's `site`, `owner` and `interpolation`, which the drawing does not read."""
    layout = example_layout()
    (height, width), seen = layout.size, set()
    for row, (x, y) in enumerate(places(layout)):
        expected = []
        for v in range(y - 2, y + 3, 2):
            for u in range(x - 2, x + 3, 2):
                if not (0 <= u < width and 0 <= v < height):
                    continue
                own = int(layout.site[0, v, u])
                rules = {
                    "linear": tuple(layout.interpolation[v * width + u].unique().tolist()),
                    "nearest": (int(layout.owner[0, v, u]),),
                    "none": (),
                }
                expected.append(Tap((u, v), own < 0, rules[exchange] if own < 0 else (own,)))
                seen.add(len(expected[-1].rows))
        assert taps(layout, row, exchange) == expected
    assert seen == {"linear": {1, 2, 4}, "nearest": {1}, "none": {0, 1}}[exchange]


def test_both_strides_read_the_same_places_and_phases_never_mix() -> None:
    """What the figure of the phases claims, at every site."""
    coarse, fine = SiteLayout(1, example_layout().lattice_size, 16), SiteLayout(1, figures.SIZE, 8)
    at = places(fine)
    for row, (x, y) in enumerate(places(coarse)):
        doubled = [(2 * u, 2 * v) for (u, v), *_ in taps(coarse, row)]
        assert [tap.place for tap in taps(fine, at.index((2 * x, 2 * y)))] == doubled
    for row, (x, y) in enumerate(at):
        assert {(u % 2, v % 2) for (u, v), *_ in taps(fine, row)} == {(x % 2, y % 2)}


def test_the_example_shows_every_case() -> None:
    """Sites at the rim of a fine region, fine blocks cut to two cells and to one, and all `linear` ghosts."""
    layout = example_layout()
    assert layout.num_extra == 3 * 3 + 1  # of a block of two cells the second is new, of a single cell none
    at = places(layout)
    for row in range(layout.num_sites):
        for (x, y), ghost, rows in taps(layout, row):
            if ghost:  # of odd size, the grid has sites on both sides of every ghost
                assert torch.tensor([at[source] for source in rows]).double().mean(0).tolist() == [x, y]
    two, four = (taps(layout, at.index(place)) for place in ((5, 2), (5, 3)))
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
