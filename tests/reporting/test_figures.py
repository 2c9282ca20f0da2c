"""The figures of docs/method.md show what the layouts hold."""

from pathlib import Path

import pytest
import torch

from sparse_seg.reporting.figures import FIGURES, example_layout, ghosts_around, main, places

pytest.importorskip("matplotlib")


def test_rows_stand_at_their_cells() -> None:
    layout = example_layout()
    at = places(layout)
    assert len(set(at)) == layout.num_sites
    for row, (x, y) in enumerate(at):
        assert layout.site[0, y, x] == row
        assert (x % 2 == 0 and y % 2 == 0) == (row < layout.num_lattice)


@pytest.mark.parametrize(("exchange", "rows"), [("linear", (1, 2, 4)), ("nearest", (1,)), ("none", ())])
def test_ghosts_are_means_of_the_rows_around_them(exchange: str, rows: tuple[int, ...]) -> None:
    layout = example_layout()
    at = places(layout)
    seen = 0
    for row in range(layout.num_lattice, layout.num_sites):
        x, y = at[row]
        for tap, sources in ghosts_around(layout, row, exchange).items():
            u, v = x + 2 * (tap % 3 - 1), y + 2 * (tap // 3 - 1)
            assert layout.site[0, v, u] < 0
            assert len(sources) in rows
            near = [max(abs(at[source][0] - u), abs(at[source][1] - v)) for source in sources]
            assert max(near) == 1
            if exchange == "linear" and 0 < u < layout.size[1] - 1 and 0 < v < layout.size[0] - 1:
                centre = torch.tensor([at[source] for source in sources]).double().mean(0)
                assert centre.tolist() == [u, v]
            seen += 1
    assert (seen > 0) == bool(rows)


def test_all_are_written(tmp_path: Path) -> None:
    main(str(tmp_path))
    for name in FIGURES:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
