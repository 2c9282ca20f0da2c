"""Plots of quality against cost. matplotlib is the optional extra `plots`, so it is imported late."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from sparse_seg.errors import import_package

Point = tuple[float, float]

# Okabe and Ito's colours, told apart by colour-blind readers; references are grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dv<"
REFERENCE_COLOUR = "#444444"
COSTS = {"gmacs": "GMACs per image", "milliseconds": "ms per image"}  # by key of a row


def cost_curve(
    series: Mapping[str, Sequence[Point]],
    xlabel: str,
    ylabel: str,
    points: Mapping[str, Point],
    chord: Sequence[Point] = (),
) -> bytes:
    """Quality over cost: one line per series, and single networks (dense OS8, OS16) as references.

    series: name -> (cost, value) pairs, drawn in order of cost. points: name -> (cost, value), drawn as a
    marker on a dashed horizontal line. chord: (cost, value) places joined by a dotted line.
    Returns a PNG file's content. Raises SparseSegError without matplotlib.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    for number, (name, values) in enumerate(series.items()):
        _draw_series(axes, number, name, values)
    _draw_references(axes, points)
    if chord:
        axes.plot(*zip(*chord, strict=True), color=REFERENCE_COLOUR, linestyle=":", zorder=2)
    _style(axes, xlabel, ylabel)
    return picture(figure)


def new_figure(size: tuple[float, float] = (7.2, 4.4)) -> Any:
    """A Figure of `size` inches with its own canvas: no pyplot, so no global state and no display."""
    missing = "plots need matplotlib: pip install 'sparse_seg[plots]'"
    figure = import_package("matplotlib.figure", missing).Figure(figsize=size, dpi=150, layout="constrained")
    import_package("matplotlib.backends.backend_agg", missing).FigureCanvasAgg(figure)
    return figure


def picture(figure: Any) -> bytes:
    """The content of a PNG file of a figure, cut to what is drawn."""
    out = io.BytesIO()
    figure.savefig(out, format="png", bbox_inches="tight", pad_inches=0.08)
    return out.getvalue()


def _draw_series(axes: Any, number: int, name: str, values: Sequence[Point]) -> None:
    costs, heights = zip(*sorted(values), strict=True)
    colour = COLOURS[number % len(COLOURS)]
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]  # no pair twice in 36 series
    axes.plot(costs, heights, color=colour, marker=marker, markersize=5, linewidth=1.8, label=name, zorder=3)


def _draw_references(axes: Any, references: Mapping[str, Point]) -> None:
    """Markers on dashed lines, each named at the end of its line that is further from the marker."""
    costs = [cost for line in axes.lines for cost in line.get_xdata()]
    costs += [cost for cost, _ in references.values()]
    middle = (min(costs) + max(costs)) / 2
    highest = max(value for _, value in references.values())
    for name, (cost, value) in references.items():
        axes.axhline(value, color=REFERENCE_COLOUR, linestyle="--", linewidth=0.9, zorder=1)
        axes.plot(cost, value, color=REFERENCE_COLOUR, marker="D", markersize=6, zorder=4)
        at_left = cost > middle
        axes.annotate(
            name,
            xy=(0 if at_left else 1, value),
            xycoords=axes.get_yaxis_transform(),  # x in 0..1 of the axes, y in data units
            xytext=(4 if at_left else -4, 3 if value == highest else -3),
            textcoords="offset points",
            ha="left" if at_left else "right",
            va="bottom" if value == highest else "top",
            color=REFERENCE_COLOUR,
            fontsize=9,
        )


def _style(axes: Any, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.05, y=0.1)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
