"""The figures of docs/method.md show what the tables of a level hold."""

import importlib.util
from pathlib import Path

import cv2
import pytest

DOCS = Path(__file__).parents[2] / "docs"
SPEC = importlib.util.spec_from_file_location("draw", DOCS / "figures/draw.py")
assert SPEC is not None
assert SPEC.loader is not None
draw = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(draw)
HEIGHT, WIDTH = draw.SIZE


@pytest.mark.parametrize("exchange", ["linear", "nearest", "none"])
def test_taps_are_those_of_the_kernel_and_ghosts_those_of_the_rule(exchange: str) -> None:
    """Against the rules as the page words them."""
    level = draw.example_level(exchange=exchange)
    at, seen = draw.places(level), set()
    for row, (x, y) in enumerate(at):
        expected = []
        for v in range(y - 2, y + 3, 2):
            for u in range(x - 2, x + 3, 2):
                if not (0 <= u < WIDTH and 0 <= v < HEIGHT):
                    continue
                is_site = (u, v) in at
                rows = [at.index(one) for one in ([(u, v)] if is_site else ghost(u, v, exchange))]
                expected.append(((u, v), not is_site, tuple(sorted(rows))))
                seen.add(len(rows))
        assert draw.taps(level, row) == expected
    assert seen == {"linear": {1, 2, 4}, "nearest": {1}, "none": {0, 1}}[exchange]


def ghost(x: int, y: int, exchange: str) -> list[tuple[int, int]]:
    """The places of the lattice whose mean a ghost is."""
    if exchange == "none":
        return []
    if exchange == "nearest":
        return [(x - x % 2, y - y % 2)]
    around = {(u, v) for u in (x - x % 2, x + x % 2) for v in (y - y % 2, y + y % 2)}
    return [(u, v) for u, v in around if u < WIDTH and v < HEIGHT]


@pytest.mark.slow
def test_all_are_written_and_those_of_the_page_are_all_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    page, made = (DOCS / "method.md").read_text(), dict(draw.FIGURES)
    for name in made:
        assert f"(figures/{name}.png)" in page
        assert (DOCS / f"figures/{name}.png").exists()
    monkeypatch.setattr(draw, "FIGURES", dict([made.popitem()]))
    draw.main([str(tmp_path / "new")])
    (file,) = (tmp_path / "new").glob("*.png")
    picture = cv2.imread(str(file))
    assert picture is not None
    assert picture.shape[1] >= 900
    assert picture.std() > 10  # not blank
