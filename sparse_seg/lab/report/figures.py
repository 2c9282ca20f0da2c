"""The figures of docs/method.md, drawn from the layouts that the networks run on.

python -m sparse_seg.lab.report.figures docs/figures
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sparse_seg.files import atomic_write
from sparse_seg.lab.report.plots import COLOURS, REFERENCE_COLOUR, new_figure, picture
from sparse_seg.models.resnet import STAGE_STRIDES
from sparse_seg.sparse import SiteLayout, densify

SITE, EXTRA, GHOST = COLOURS[:3]
GREY = REFERENCE_COLOUR
SIZE, FINE = (7, 9), ((0, 1), (1, 1), (1, 2), (2, 4), (3, 4))  # cells of the fine grid; fine blocks (y, x)

Place = tuple[int, int]


class Tap(NamedTuple):
    """What one tap of a 3x3 reads: its place (x, y) on the finest grid, whether that is a ghost, and the rows
    whose mean stands there (none: zero)."""

    place: Place
    ghost: bool
    rows: tuple[int, ...]


def example_layout() -> SiteLayout:
    """One image of odd size with a few fine blocks, some of them cut by the border."""
    blocks = torch.zeros(1, (SIZE[0] + 1) // 2, (SIZE[1] + 1) // 2, dtype=torch.bool)
    for y, x in FINE:
        blocks[0, y, x] = True
    return SiteLayout.from_fine_blocks(blocks, SIZE)


def places(layout: SiteLayout) -> list[Place]:
    """(x, y) of each row on the finest grid."""
    return [_place(layout, cell) for cell in layout.cells.tolist()]


def taps(layout: SiteLayout, row: int, exchange: str = "linear", spacing: int = 16) -> list[Tap]:
    """The taps inside the image of a 3x3 at the site of `row`, from the layout's own neighbour tables."""
    table = layout.neighbours(layout, spacing, exchange, lattice=True)
    known = layout.neighbours(layout, spacing, "linear", lattice=True)  # has a place for every tap
    found = []
    for entry, at, inside in zip(table.index[row], known.index[row], known.inside[row], strict=True):
        if not inside:
            continue
        ghost = int(at) - layout.num_sites
        cell = layout.cells[at] if ghost < 0 else known.ghost_cells[ghost]
        rows = [int(entry)] if ghost < 0 else []
        if ghost >= 0 and table.num_ghosts:
            rows = table.ghosts[int(entry) - layout.num_sites].unique().tolist()
        found.append(Tap(_place(layout, int(cell)), ghost >= 0, tuple(rows)))
    return found


def lattice_figure() -> bytes:
    """Coarse and fine blocks, and the sites' rows in lattice order."""
    layout = example_layout()
    figure = new_figure((7.2, 5.2))
    axes = figure.add_subplot()
    _grid(axes, layout)
    _sites(axes, layout, labels=True)
    last = layout.num_lattice - 1
    title = f"rows 0 to {last}: the coarse lattice, complete (blue); from {last + 1} on: extra sites (orange)"
    axes.set_title(title, fontsize=10)
    return picture(figure)


def phases_figure() -> bytes:
    """Taps of a 3x3: dilation 1 at stride 16 and dilation 2 at stride 8 read the same places."""
    fine = SiteLayout(1, SIZE, 8)
    coarse = SiteLayout(1, example_layout().lattice_size, 16)
    figure = new_figure((7.2, 3.4))
    panels = (
        (coarse, "stride 16, dilation 1", [(2, 1)]),
        (fine, "stride 8, dilation 2: four phases", [(4, 2), (3, 3)]),
    )
    for number, (layout, title, centres) in enumerate(panels):
        axes = figure.add_subplot(1, 2, number + 1)
        step, at = layout.stride // fine.stride, places(layout)
        _grid(axes, fine, blocks=False)
        for x, y in at:
            _dot(axes, x * step, y * step, _phase(x * step, y * step))
        for centre in centres:
            read = [(x * step, y * step) for (x, y), *_ in taps(layout, at.index(centre))]
            _rings(axes, (centre[0] * step, centre[1] * step), read)
        axes.set_title(title, fontsize=10)
    return picture(figure)


def exchange_figure() -> bytes:
    """What extra sites at the rim of a fine region read under each rule."""
    layout = example_layout()
    at = places(layout)
    figure = new_figure((7.2, 5.8))
    panels = (
        ("linear", (5, 2), "linear, phase 1: means of 2 rows"),
        ("linear", (5, 3), "linear, phase 3: means of 4 rows"),
        ("nearest", (5, 3), "nearest: the block's own site"),
        ("none", (5, 3), "none: zero"),
    )
    for number, (exchange, centre, title) in enumerate(panels):
        axes = figure.add_subplot(2, 2, number + 1)
        _grid(axes, layout)
        _sites(axes, layout)
        read = taps(layout, at.index(centre), exchange)
        for tap in read:
            if tap.ghost:
                _ghost(axes, tap, [at[row] for row in tap.rows])
        _rings(axes, centre, [tap.place for tap in read], "black")
        axes.set_title(title, fontsize=10)
    return picture(figure)


def densify_figure() -> bytes:
    """Values of the sites, and the grid that densify makes of them."""
    from matplotlib import colormaps

    layout = example_layout()
    at = torch.tensor(places(layout), dtype=torch.float32)
    rows = torch.sin(0.7 * at[:, :1]) + torch.cos(0.9 * at[:, 1:])
    sparse = torch.full((1, 1, *layout.size), float("nan"))
    sparse.view(-1)[layout.cells] = rows[:, 0]
    figure = new_figure((7.2, 3.4))
    panels = {"values of the sites": sparse, "densified: interpolated where no dot is": densify(rows, layout)}
    for number, (title, grid) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 2, number + 1)
        colours = colormaps["Greys"].with_extremes(bad="white")
        axes.imshow(grid[0, 0].numpy(), cmap=colours, vmin=-2.5, vmax=3, zorder=0.5)
        _grid(axes, layout, shade=False)
        _sites(axes, layout)
        axes.set_title(title, fontsize=10)
    return picture(figure)


def flow_figure() -> bytes:
    """The network as boxes: what is dense, and what runs on rows."""
    stages = [f"layer{number + 1}" for number in range(len(STAGE_STRIDES))]
    first = sum(stride <= 8 for stride in STAGE_STRIDES)
    boxes = {
        "image": ("image", 0, 0, GREY),
        "early": ("\n".join(["stem", *stages[:first]]), 1.15, 0, SITE),
        "late": ("\n".join(stages[first:]), 3.2, 0, EXTRA),
        "neck": ("neck", 4.4, 0, EXTRA),
        "densify": ("densify", 5.6, 0, GREY),
        "head": ("rest of\nhead", 6.9, 0, SITE),
        "upsample": ("upsample", 8.2, 0, SITE),
        "policy": ("mask policy", 1.15, 1, GHOST),
        "layout": ("SiteLayout", 3.2, 1, GHOST),
    }
    arrows = "image early late neck densify head upsample, image policy layout late, early policy"
    arrows += ", layout neck, layout densify"
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


def _place(layout: SiteLayout, cell: int) -> Place:
    return cell % layout.size[1], cell // layout.size[1]


def _phase(x: int, y: int) -> str:
    return COLOURS[2 * (y % 2) + x % 2]


def _grid(axes: Any, layout: SiteLayout, blocks: bool = True, shade: bool = True) -> None:
    """Cells as thin lines, blocks as thick ones, fine blocks shaded."""
    height, width = layout.size
    right, bottom = width - 0.5, height - 0.5
    thin, thick = {"color": "#cccccc", "linewidth": 0.6, "zorder": 1}, {"color": "#888888", "zorder": 2}
    lines = [(range(width + 1), range(height + 1), thin), ([0, width], [0, height], thick)]
    if blocks:
        lines.append((range(0, width, 2), range(0, height, 2), thick))
        for _, y, x in layout.splits[0].nonzero().tolist() if shade else ():
            xs, ys = [2 * x - 0.5, min(2 * x + 1.5, right)], [2 * y - 0.5, min(2 * y + 1.5, bottom)]
            axes.fill([xs[0], xs[1], xs[1], xs[0]], [ys[0], ys[0], ys[1], ys[1]], color="#fbe3d0", zorder=0)
    for columns, rows, style in lines:
        axes.vlines([x - 0.5 for x in columns], -0.5, bottom, **style)
        axes.hlines([y - 0.5 for y in rows], -0.5, right, **style)
    axes.set_xlim(-0.6, right + 0.1)
    axes.set_ylim(bottom + 0.1, -0.6)
    axes.set_aspect("equal")
    axes.axis("off")


def _sites(axes: Any, layout: SiteLayout, labels: bool = False) -> None:
    for row, (x, y) in enumerate(places(layout)):
        _dot(axes, x, y, SITE if row < layout.num_lattice else EXTRA, str(row) if labels else "")


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
