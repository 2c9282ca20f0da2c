"""The figures of docs/method.md, drawn from the tables that the networks run on.

python docs/figures/draw.py docs/figures
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparse_seg.files import atomic_write
from sparse_seg.lab.report.plots import COLOURS, REFERENCE_COLOUR, new_figure, picture
from sparse_seg.networks.resnet import STRIDES
from sparse_seg.sites import Level, LevelPlan, Taps

SITE, EXTRA, GHOST = COLOURS[:3]
GREY = REFERENCE_COLOUR
STRIDE, SPACING = 8, 16  # px: of the fine grid; between taps
SIZE, FINE = (7, 9), ((0, 1), (1, 1), (1, 2), (2, 4), (3, 4))  # cells of the fine grid; fine blocks (y, x)
ALL = tuple(product(range(-(-SIZE[0] // 2)), range(-(-SIZE[1] // 2))))  # blocks

Place = tuple[int, int]


class Tap(NamedTuple):
    """What one tap of a 3x3 reads: its place (x, y) on the finest grid, whether that is a ghost, and the rows
    whose mean stands there (none: zero)."""

    place: Place
    ghost: bool
    rows: tuple[int, ...]


def example_level(fine: Sequence[Place] = FINE, exchange: str = "linear") -> Level:
    """One image of odd size with a few fine blocks (y, x), some of them cut by the border."""
    plan = LevelPlan(1, (SIZE[0] * STRIDE, SIZE[1] * STRIDE), STRIDE)
    cells = [y * plan.coarse[1] + x for y, x in fine]
    return Level(plan, torch.tensor(cells, dtype=torch.int64), exchange)


def places(level: Level) -> list[Place]:
    """(x, y) on the finest grid of each site: those of the lattice, then extra ones, block by block."""
    return [(cell % SIZE[1], cell // SIZE[1]) for cell, _ in _sites_of(level)]


def taps(level: Level, row: int) -> list[Tap]:
    """The taps inside the image of a 3x3 at the site of `row`: what the level's tables read."""
    window, plan = Taps((-SPACING, 0, SPACING), (-SPACING, 0, SPACING)), level.plan
    at, columns = places(level), [column for _, column in _sites_of(level)]
    one_hot = torch.eye(plan.cells + 3 * level.count)  # a site's value tells which site it is
    source, extras = one_hot[: plan.cells], one_hot[plan.cells :]
    if row < plan.cells:
        read = torch.cat([source, 0 * source[:1]])[plan.around_cells(window)[row]]
    else:
        table = level.table(source, extras, level.kind(window))
        read = table[level.tap_rows(window)].unflatten(0, (-1, window.number))[columns[row] - plan.cells]
    (x, y), step, found = at[row], SPACING // STRIDE, []
    for values, (down, right) in zip(read, product((-step, 0, step), repeat=2), strict=True):
        place = x + right, y + down
        if 0 <= place[0] < SIZE[1] and 0 <= place[1] < SIZE[0]:
            rows = sorted(columns.index(column) for column in values.nonzero()[:, 0].tolist())
            found.append(Tap(place, place not in at, tuple(rows)))
    return found


def _sites_of(level: Level) -> list[tuple[int, int]]:
    """The cell of the finest grid of each site, and its number among those of the lattice and the level."""
    plan = level.plan
    lattice = [(cell, number) for number, cell in enumerate(plan.fine_of_phases[0].tolist())]
    extras = plan.fine_of_phases[1:, level.cells]
    numbers = plan.cells + torch.arange(extras.numel()).view_as(extras)
    pairs = zip(extras.T.flatten().tolist(), numbers.T.flatten().tolist(), strict=True)
    return lattice + [(cell, number) for cell, number in pairs if cell < plan.fine_cells]


def lattice_figure() -> bytes:
    """Coarse and fine blocks, and the sites' rows in lattice order."""
    level = example_level()
    figure = new_figure((7.2, 5.2))
    axes = figure.add_subplot()
    _grid(axes, FINE)
    _sites(axes, level, labels=True)
    last = level.plan.cells - 1
    title = f"rows 0 to {last}: the coarse lattice, complete (blue); from {last + 1} on: extra sites (orange)"
    axes.set_title(title, fontsize=10)
    return picture(figure)


def phases_figure() -> bytes:
    """Taps of a 3x3: dilation 1 at stride 16 and dilation 2 at stride 8 read the same places."""
    figure = new_figure((7.2, 3.4))
    panels = (
        (example_level(()), "stride 16, dilation 1", [(4, 2)]),
        (example_level(ALL), "stride 8, dilation 2: four phases", [(4, 2), (3, 3)]),
    )
    for number, (level, title, centres) in enumerate(panels):
        axes = figure.add_subplot(1, 2, number + 1)
        at = places(level)
        _grid(axes)
        for place in at:
            _dot(axes, *place, _phase(*place))
        for centre in centres:
            _rings(axes, centre, [tap.place for tap in taps(level, at.index(centre))])
        axes.set_title(title, fontsize=10)
    return picture(figure)


def exchange_figure() -> bytes:
    """What extra sites at the rim of a fine region read under each rule."""
    figure = new_figure((7.2, 5.8))
    panels = (
        ("linear", (5, 2), "linear, phase 1: means of 2 rows"),
        ("linear", (5, 3), "linear, phase 3: means of 4 rows"),
        ("nearest", (5, 3), "nearest: the block's own site"),
        ("none", (5, 3), "none: zero"),
    )
    for number, (exchange, centre, title) in enumerate(panels):
        axes, level = figure.add_subplot(2, 2, number + 1), example_level(exchange=exchange)
        at = places(level)
        _grid(axes, FINE)
        _sites(axes, level)
        read = taps(level, at.index(centre))
        for tap in read:
            if tap.ghost:
                _ghost(axes, tap, [at[row] for row in tap.rows])
        _rings(axes, centre, [tap.place for tap in read], "black")
        axes.set_title(title, fontsize=10)
    return picture(figure)


def densify_figure() -> bytes:
    """Values of the sites, and the grid that densify makes of them."""
    from matplotlib import colormaps

    level = example_level()
    cells, numbers = torch.tensor(_sites_of(level)).T
    x, y = cells % SIZE[1], cells // SIZE[1]
    values = torch.sin(0.7 * x) + torch.cos(0.9 * y)
    sparse = torch.full((SIZE[0] * SIZE[1],), float("nan")).index_copy(0, cells, values)
    rows = torch.zeros(level.plan.cells + 3 * level.count, 1).index_copy(0, numbers, values[:, None])
    dense = level.complete(rows[: level.plan.cells], rows[level.plan.cells :])
    figure = new_figure((7.2, 3.4))
    panels = {"values of the sites": sparse, "densified: interpolated where no dot is": dense}
    for number, (title, grid) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 2, number + 1)
        colours = colormaps["Greys"].with_extremes(bad="white")
        axes.imshow(grid.view(SIZE).numpy(), cmap=colours, vmin=-2.5, vmax=3, zorder=0.5)
        _grid(axes, ())
        _sites(axes, level)
        axes.set_title(title, fontsize=10)
    return picture(figure)


def flow_figure() -> bytes:
    """The network as boxes: what is dense, and what runs on rows."""
    stages = [f"layer{number + 1}" for number in range(len(STRIDES))]
    first = sum(stride <= STRIDE for stride in STRIDES)
    boxes = {
        "image": ("image", 0, 0, GREY),
        "early": ("\n".join(["stem", *stages[:first]]), 1.15, 0, SITE),
        "late": ("\n".join(stages[first:]), 3.2, 0, EXTRA),
        "neck": ("neck", 4.4, 0, EXTRA),
        "densify": ("densify", 5.6, 0, GREY),
        "head": ("rest of\nhead", 6.9, 0, SITE),
        "upsample": ("upsample", 8.2, 0, SITE),
        "policy": ("mask policy", 1.15, 1, GHOST),
        "sites": ("sites", 3.2, 1, GHOST),
    }
    arrows = "image early late neck densify head upsample, image policy sites late, early policy"
    arrows += ", sites neck, sites densify"
    notes = (
        (1.15, SITE, "dense: costs the same\nwhatever the mask"),
        (3.8, EXTRA, "on rows: pays for\nits sites only"),
        (7.5, SITE, "dense, on the finest grid: costs\nthe same whatever the mask"),
    )
    figure = new_figure((9.6, 2.5))
    axes = figure.add_subplot(xlim=(-0.5, 8.8), ylim=(-1, 1.3))
    axes.axis("off")
    drawn = {name: _box(axes, *box) for name, box in boxes.items()}
    for path in arrows.split(", "):
        for start, end in pairwise(path.split()):
            _arrow(axes, drawn[start], drawn[end])
    for x, colour, note in notes:
        axes.text(x, -0.8, note, ha="center", va="center", color=colour, fontsize=10)
    return picture(figure)


FIGURES = {
    "lattice": lattice_figure,
    "phases": phases_figure,
    "exchange": exchange_figure,
    "densify": densify_figure,
    "flow": flow_figure,
}


def _phase(x: int, y: int) -> str:
    return COLOURS[2 * (y % 2) + x % 2]


def _grid(axes: Any, fine: Sequence[Place] | None = None) -> None:
    """Cells as thin lines; blocks as thick ones, fine ones shaded, but for None."""
    height, width = SIZE
    right, bottom = width - 0.5, height - 0.5
    thin, thick = {"color": "#cccccc", "linewidth": 0.6, "zorder": 1}, {"color": "#888888", "zorder": 2}
    lines = [(range(width + 1), range(height + 1), thin), ([0, width], [0, height], thick)]
    if fine is not None:
        lines.append((range(0, width, 2), range(0, height, 2), thick))
        for y, x in fine:
            xs, ys = [2 * x - 0.5, min(2 * x + 1.5, right)], [2 * y - 0.5, min(2 * y + 1.5, bottom)]
            axes.fill([xs[0], xs[1], xs[1], xs[0]], [ys[0], ys[0], ys[1], ys[1]], color="#fbe3d0", zorder=0)
    for columns, rows, style in lines:
        axes.vlines([x - 0.5 for x in columns], -0.5, bottom, **style)
        axes.hlines([y - 0.5 for y in rows], -0.5, right, **style)
    axes.set_xlim(-0.6, right + 0.1)
    axes.set_ylim(bottom + 0.1, -0.6)
    axes.set_aspect("equal")
    axes.axis("off")


def _sites(axes: Any, level: Level, labels: bool = False) -> None:
    for row, (x, y) in enumerate(places(level)):
        _dot(axes, x, y, SITE if row < level.plan.cells else EXTRA, str(row) if labels else "")


def _dot(axes: Any, x: int, y: int, colour: str, text: str = "") -> None:
    axes.plot(x, y, "o", color=colour, markersize=19 if text else 8, zorder=3)
    axes.text(x, y, text, ha="center", va="center_baseline", fontsize=10, color="white", zorder=4)


def _rings(axes: Any, centre: Place, read: Sequence[Place], colour: str | None = None) -> None:
    """A ring around each place that is read, and a square around the one that is written."""
    style = {"color": colour or _phase(*centre), "fillstyle": "none", "markeredgewidth": 1.6}
    for x, y in read:
        axes.plot(x, y, "o", markersize=14, zorder=5, **style)
    axes.plot(*centre, "s", markersize=19, zorder=5, **style)


def _ghost(axes: Any, tap: Tap, sources: Sequence[Place]) -> None:
    """A diamond with arrows from the sites whose mean it is; a cross where it is zero."""
    if not sources:
        axes.plot(*tap.place, "x", color=GREY, markersize=7, markeredgewidth=2, zorder=6)
        return
    axes.plot(*tap.place, "D", color=GHOST, markersize=7, zorder=6)
    style = {"arrowstyle": "-|>", "color": GHOST, "linewidth": 1.4, "shrinkA": 4, "shrinkB": 5}
    for source in sources:
        axes.annotate("", xy=tap.place, xytext=source, arrowprops=style, zorder=5)


def _box(axes: Any, name: str, x: float, y: float, colour: str) -> Any:
    box = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": colour, "linewidth": 2}
    return axes.text(x, y, name, ha="center", va="center", fontsize=11, bbox=box, zorder=3)


def _arrow(axes: Any, start: Any, end: Any) -> None:
    """Between two boxes, along the line of their centres, from edge to edge."""
    patches = {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()}
    style = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 3, "shrinkB": 3, **patches}
    axes.annotate("", xy=end.get_position(), xytext=start.get_position(), arrowprops=style)


def main(argv: Sequence[str] | None = None) -> None:
    """Write all figures into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the PNG files go")
    folder = parser.parse_args(argv).folder
    for name, draw in FIGURES.items():
        atomic_write(folder / f"{name}.png", draw())


if __name__ == "__main__":
    main()
