"""The figures of docs/method.md, drawn from the layouts that the networks run on.

python -m sparse_seg.reporting.figures docs/figures
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_seg.files import atomic_write
from sparse_seg.reporting.plots import COLOURS, new_figure
from sparse_seg.sparse import EXCHANGES, SiteLayout, densify

SITE, EXTRA, GHOST, MISSING = COLOURS[0], COLOURS[1], COLOURS[2], "#bbbbbb"
SIZE, FINE = (7, 9), ((0, 1), (1, 1), (1, 2), (3, 4))  # cells of the fine grid; fine blocks (row, column)


def example_layout(size: tuple[int, int] = SIZE, fine: tuple[tuple[int, int], ...] = FINE) -> SiteLayout:
    """One image of odd size with a few fine blocks."""
    blocks = torch.zeros(1, (size[0] + 1) // 2, (size[1] + 1) // 2, dtype=torch.bool)
    for y, x in fine:
        blocks[0, y, x] = True
    return SiteLayout.from_fine_blocks(blocks, size)


def places(layout: SiteLayout) -> list[tuple[int, int]]:
    """(x, y) of each row on the finest grid."""
    width = layout.size[1]
    return [(int(cell) % width, int(cell) // width) for cell in layout.cells]


def ghosts_around(layout: SiteLayout, row: int, exchange: str) -> dict[int, list[int]]:
    """For a 3x3 at the site of an extra row: which taps read a ghost, and the rows whose mean it is."""
    table = layout.neighbours(layout, 2 * layout.stride, exchange)
    index = table.index[row - layout.num_lattice]
    found = {}
    for tap, entry in enumerate(index.tolist()):
        ghost = entry - layout.num_sites
        if 0 <= ghost < table.ghosts.shape[0]:
            found[tap] = sorted(set(table.ghosts[ghost].tolist()))
    return found


def lattice_figure() -> bytes:
    """Coarse and fine blocks, and the sites' rows in lattice order."""
    layout = example_layout()
    figure = new_figure((7.2, 5.2))
    axes = figure.add_subplot()
    _grid(axes, layout)
    for row, (x, y) in enumerate(places(layout)):
        _site(axes, x, y, SITE if row < layout.num_lattice else EXTRA, str(row))
    last = layout.num_lattice - 1
    title = f"rows 0 to {last}: the coarse lattice, complete (blue); then the extra sites (orange)"
    axes.set_title(title, fontsize=9)
    return _png(figure)


def phases_figure() -> bytes:
    """Taps of a 3x3: dilation 1 at stride 16 and dilation 2 at stride 8 read the same places."""
    figure = new_figure((7.2, 3.6))
    layout = SiteLayout(1, SIZE, 8)
    for number, (step, title) in enumerate(
        ((2, "stride 16, dilation 1"), (1, "stride 8, dilation 2: four phases that never mix"))
    ):
        axes = figure.add_subplot(1, 2, number + 1)
        _grid(axes, layout, blocks=False)
        for x, y in places(layout):
            if x % step == 0 and y % step == 0:
                _site(axes, x, y, COLOURS[2 * (y % 2) + x % 2])
        for x, y in ((4, 2), (3, 5))[: 2 // step]:
            _taps(axes, x, y, COLOURS[2 * (y % 2) + x % 2])
        axes.set_title(title, fontsize=9)
    return _png(figure)


def exchange_figure() -> bytes:
    """What an extra site at the rim of a fine region reads under each rule."""
    layout = example_layout()
    at = places(layout)
    row = next(r for r, place in enumerate(at) if place == (5, 2) and r >= layout.num_lattice)
    x, y = at[row]
    figure = new_figure((9.6, 3.2))
    for number, exchange in enumerate(EXCHANGES):
        axes = figure.add_subplot(1, 3, number + 1)
        _grid(axes, layout)
        for other, (u, v) in enumerate(at):
            _site(axes, u, v, SITE if other < layout.num_lattice else EXTRA)
        _taps(axes, x, y, "black")
        ghosts = ghosts_around(layout, row, exchange)
        for tap in range(9):
            u, v = x + 2 * (tap % 3 - 1), y + 2 * (tap // 3 - 1)
            inside = 0 <= u < layout.size[1] and 0 <= v < layout.size[0]
            if inside and tap not in ghosts and layout.site[0, v, u] < 0:
                axes.plot(u, v, "x", color=MISSING, markersize=8, markeredgewidth=2, zorder=5)
        for tap, rows in ghosts.items():
            u, v = x + 2 * (tap % 3 - 1), y + 2 * (tap // 3 - 1)
            for source in rows:
                axes.plot([u, at[source][0]], [v, at[source][1]], color=GHOST, linewidth=1.6, zorder=4)
            axes.plot(u, v, "D", color=GHOST, markersize=8, zorder=6)
        axes.set_title(exchange, fontsize=9)
    return _png(figure)


def densify_figure() -> bytes:
    """Rows, and the grid that densify makes of them."""
    layout = example_layout()
    at = places(layout)
    rows = torch.tensor([[_height(x, y)] for x, y in at])
    figure = new_figure((7.2, 3.2))
    sparse = torch.full((1, 1, *layout.size), float("nan"))
    for (x, y), value in zip(at, rows, strict=True):
        sparse[0, 0, y, x] = value
    for number, (grid, title) in enumerate(
        ((sparse, "sites"), (densify(rows, layout), "densified: interpolated, sites kept"))
    ):
        axes = figure.add_subplot(1, 2, number + 1)
        _image(axes, grid[0, 0], layout)
        axes.set_title(title, fontsize=9)
    return _png(figure)


def flow_figure() -> bytes:
    """The network as boxes: what is dense, and what runs on rows."""
    steps = (
        ("image", "", MISSING),
        ("stem\nlayer1\nlayer2", "dense", SITE),
        ("mask\npolicy", "fine blocks", GHOST),
        ("layer3\nlayer4", "rows", EXTRA),
        ("neck", "rows", EXTRA),
        ("densify", "rows to grid", MISSING),
        ("head", "dense", SITE),
        ("up-\nsample", "dense", SITE),
    )
    figure = new_figure((9.6, 1.9))
    axes = figure.add_subplot()
    for number, (name, kind, colour) in enumerate(steps):
        box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": colour, "linewidth": 2}
        axes.text(number, 0, name, ha="center", va="center", fontsize=10, bbox=box)
        axes.text(number, -0.62, kind, ha="center", va="center", fontsize=8, color="#555555")
        if number:
            arrow = {"arrowstyle": "->", "color": "#555555"}
            axes.annotate("", xy=(number - 0.38, 0), xytext=(number - 0.62, 0), arrowprops=arrow)
    axes.set_xlim(-0.6, len(steps) - 0.4)
    axes.set_ylim(-0.8, 0.6)
    axes.axis("off")
    return _png(figure)


FIGURES = {
    "lattice": lattice_figure,
    "phases": phases_figure,
    "exchange": exchange_figure,
    "densify": densify_figure,
    "flow": flow_figure,
}


def _height(x: int, y: int) -> float:
    return float(torch.sin(torch.tensor(0.7 * x)) + torch.cos(torch.tensor(0.9 * y)))


def _grid(axes: Any, layout: SiteLayout, blocks: bool = True) -> None:
    """Cells as thin lines, blocks as thick ones, fine blocks shaded."""
    height, width = layout.size
    for x in range(width + 1):
        axes.plot([x - 0.5] * 2, [-0.5, height - 0.5], color="#dddddd", linewidth=0.6, zorder=1)
    for y in range(height + 1):
        axes.plot([-0.5, width - 0.5], [y - 0.5] * 2, color="#dddddd", linewidth=0.6, zorder=1)
    if blocks:
        for _, y, x in layout.splits[0].nonzero().tolist():
            right, below = min(2 * x + 1.5, width - 0.5), min(2 * y + 1.5, height - 0.5)
            corners = [2 * x - 0.5, right, right, 2 * x - 0.5], [2 * y - 0.5, 2 * y - 0.5, below, below]
            axes.fill(*corners, color="#fbe3d0", zorder=0)
        for x in range(0, width + 1, 2):
            axes.plot([x - 0.5] * 2, [-0.5, height - 0.5], color="#888888", linewidth=1.1, zorder=2)
        for y in range(0, height + 1, 2):
            axes.plot([-0.5, width - 0.5], [y - 0.5] * 2, color="#888888", linewidth=1.1, zorder=2)
    axes.set_xlim(-0.6, width - 0.4)
    axes.set_ylim(height - 0.4, -0.6)
    axes.set_aspect("equal")
    axes.axis("off")


def _site(axes: Any, x: int, y: int, colour: str, text: str = "") -> None:
    axes.plot(x, y, "o", color=colour, markersize=17 if text else 8, zorder=3)
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white", zorder=4)


def _taps(axes: Any, x: int, y: int, colour: str) -> None:
    """A ring around each of the nine places that a 3x3, two cells apart, reads at (x, y)."""
    for tap in range(9):
        u, v = x + 2 * (tap % 3 - 1), y + 2 * (tap // 3 - 1)
        axes.plot(u, v, "o", color=colour, markersize=14, fillstyle="none", markeredgewidth=1.6, zorder=5)
    axes.plot(x, y, "s", color=colour, markersize=19, fillstyle="none", markeredgewidth=1.6, zorder=5)


def _image(axes: Any, grid: Tensor, layout: SiteLayout) -> None:
    from matplotlib import colormaps

    _grid(axes, layout)
    colours = colormaps["cividis"].with_extremes(bad="white")
    axes.imshow(grid.numpy(), cmap=colours, vmin=-2, vmax=2, zorder=1.5)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def main(folder: str) -> None:
    """Write all figures."""
    for name, draw in FIGURES.items():
        atomic_write(Path(folder) / f"{name}.png", draw())


if __name__ == "__main__":
    main(sys.argv[1])
