"""Cars, trucks and buses."""

import numpy as np
from numpy.typing import ArrayLike

from sparse_seg.data.scenes.canvas import Canvas, Colour, along, box, disc, facing
from sparse_seg.data.scenes.objects import PAINTS, TYRE

_GLASS = np.array((48.0, 56.0, 66.0))


def draw_vehicle(
    canvas: Canvas, rng: np.random.Generator, x: float, z: float, kind: str = "car", across: bool = False
) -> None:
    """A car, truck or bus whose near end stands at (x, z); `across` turns it to show its side."""
    length, width, height, sill = {
        "car": (
            rng.uniform(3.6, 4.8),
            rng.uniform(1.7, 1.9),
            rng.uniform(1.4, 1.75),
            rng.uniform(0.85, 0.95),
        ),
        "truck": (rng.uniform(6, 9), 2.4, rng.uniform(2.8, 3.6), 1.2),
        "bus": (rng.uniform(9, 12), 2.5, rng.uniform(2.9, 3.2), 1.3),
    }[kind]
    colour = PAINTS[rng.integers(len(PAINTS))] * rng.uniform(0.8, 1.1)
    half, depth = (length / 2, width) if across else (width / 2, length)
    span = (x - half, x + half)
    canvas.polygon(_ground(span, (z - 0.2, z + depth), grow=0.2), (30, 31, 34))
    visible = -1 if x > 0 else 1  # the side towards the middle of the street
    side = colour * canvas.light.shade(visible)
    near = colour * canvas.light.shade(0)
    canvas.hull(box(span, (0.25, sill), (z, z + depth)), side, kind)
    canvas.polygon(facing(span, (0.25, sill), z), near)
    _draw_wheels(canvas, span, z, depth, visible, kind, across)
    _draw_upper_part(canvas, rng, span, (sill, height), (z, z + depth), near, side, kind, across)
    if not across:
        _draw_lamps(canvas, rng, span, sill, z)


def _ground(x: tuple[float, float], z: tuple[float, float], grow: float) -> ArrayLike:
    left, right = x[0] - grow, x[1] + grow
    return [(left, 0, z[0]), (right, 0, z[0]), (right, 0, z[1]), (left, 0, z[1])]


def _draw_wheels(
    canvas: Canvas, span: tuple[float, float], z: float, depth: float, visible: int, kind: str, across: bool
) -> None:
    radius = 0.33 if kind == "car" else 0.48
    if across:
        for x in (span[0] + 2.3 * radius, span[1] - 2.3 * radius):
            canvas.polygon(disc((x, radius, z - 0.02), radius), TYRE, kind)
            canvas.polygon(disc((x, radius, z - 0.02), radius * 0.5), (120, 122, 126))
        return
    for x in (span[0], span[1] - 0.24):
        canvas.polygon(facing((x, x + 0.24), (0, 2 * radius * 0.8), z + 0.05), TYRE, kind)
    x = span[0] if visible < 0 else span[1]
    for middle in (z + 2.3 * radius, z + depth - 2.3 * radius):
        turned = disc((0, radius, 0), radius)
        turned = np.stack([np.full(len(turned), x), turned[:, 1], middle + turned[:, 0]], axis=1)
        canvas.polygon(turned, TYRE, kind)


def _draw_upper_part(
    canvas: Canvas,
    rng: np.random.Generator,
    x: tuple[float, float],
    y: tuple[float, float],
    z: tuple[float, float],
    near: Colour,
    side: Colour,
    kind: str,
    across: bool,
) -> None:
    """Cabin with windows; a truck's is a plain box."""
    if kind != "car":
        canvas.hull(box(x, y, z), side, kind)
        canvas.polygon(facing(x, y, z[0]), near)
        if kind == "bus" or rng.random() < 0.5:
            top = y[1] - 0.45 * (y[1] - y[0])
            canvas.polygon(facing((x[0] + 0.15, x[1] - 0.15), (top - 0.5, y[1] - 0.3), z[0]), _GLASS)
        if kind == "bus":
            edge = x[0] if x[0] > 0 else x[1]
            canvas.polygon(along(edge, (y[0] + 0.2, y[1] - 0.5), (z[0] + 0.4, z[1] - 0.4)), _GLASS)
        return
    lean_x, lean_z = (0.9, 0.1) if across else (0.18, 0.7)  # roof edge behind body edge, m
    low, high = y
    foot = [(a, low, c) for a in (x[0] + 0.04, x[1] - 0.04) for c in (z[0] + 0.02, z[1] - 0.8)]
    roof_z = (z[0] + lean_z * 0.5, max(z[1] - 0.8 - lean_z, z[0] + lean_z))
    roof = [(a, high, c) for a in (x[0] + lean_x, x[1] - lean_x) for c in roof_z]
    canvas.hull(foot + roof, side, kind)
    inset = 0.12
    x_low, x_high = (x[0] + inset, x[1] - inset), (x[0] + lean_x + inset, x[1] - lean_x - inset)
    glass = _GLASS * rng.uniform(0.7, 1.8)
    y_low, y_high = low + 0.04, high - 0.1
    window = [(x_low[0], y_low, z[0]), (x_low[1], y_low, z[0])]
    window += [(x_high[1], y_high, roof_z[0]), (x_high[0], y_high, roof_z[0])]
    canvas.polygon(window, glass)


def _draw_lamps(
    canvas: Canvas, rng: np.random.Generator, x: tuple[float, float], sill: float, z: float
) -> None:
    lamp = (176, 34, 30) if rng.random() < 0.6 else (236, 232, 214)  # seen from behind or from the front
    for left in (x[0] + 0.05, x[1] - 0.37):
        canvas.polygon(facing((left, left + 0.32), (sill - 0.25, sill - 0.08), z), lamp)
    middle = (x[0] + x[1]) / 2
    canvas.polygon(facing((middle - 0.26, middle + 0.26), (0.45, 0.57), z), (214, 214, 206))
