"""What stands and moves in the street: flat figures from one table, trees and vehicles."""

from typing import NamedTuple

import numpy as np

from sparse_seg.data.scenes.canvas import Canvas, Colour, rectangle

PAINTS = [(186, 188, 190), (40, 42, 46), (98, 102, 108), (232, 232, 228), (138, 26, 28), (30, 58, 112)]
PAINTS += [(70, 84, 60), (150, 138, 112), (196, 156, 44)]
_CLOTHES = [*PAINTS, (48, 92, 140), (120, 60, 120), (60, 110, 90), (150, 70, 40)]
# of each part of a figure, one is drawn
_COLOURS: dict[str, list[tuple[int, int, int]]] = {
    "coat": _CLOTHES, "trousers": _CLOTHES, "bin": _CLOTHES, "frame": PAINTS,
    "skin": [(224, 184, 158), (186, 138, 108), (120, 82, 60), (84, 58, 46)],
    "hair": [(30, 26, 24), (90, 64, 40), (150, 120, 70), (120, 120, 120)],
    "metal": [(62, 62, 64), (120, 122, 122), (158, 158, 160)],
    "tyre": [(28, 28, 30)], "case": [(34, 36, 36)], "bulb": [(200, 200, 190)],
    "rim": [(190, 28, 30), (190, 28, 30), (28, 70, 160), (236, 236, 230), (150, 150, 152)],
    "board": [(236, 236, 230), (236, 236, 230), (40, 88, 180), (214, 170, 32), (128, 128, 130)],
    "red": [(230, 40, 30), (60, 12, 10)], "amber": [(70, 48, 12)], "green": [(60, 200, 110), (14, 50, 28)],
}  # fmt: skip
Points = list[tuple[float, float]]


class Shape(NamedTuple):
    """Of a figure: a polygon, or a line so wide, through points (x, y), m; x is 0 at the figure's foot."""

    label: str
    colour: str
    points: Points
    width: float = 0


def ring(x: float, y: float, radius: float, corners: int = 12) -> Points:
    """A regular polygon, closed, one corner up."""
    turn = 2 * np.pi * np.arange(corners + 1) / corners
    return [(x + radius * np.sin(one), y + radius * np.cos(one)) for one in turn]


def _sign(corners: int) -> list[Shape]:
    outer, inner = (ring(0, 2.6, radius, corners) for radius in (0.4, 0.28))
    return [*_POST, Shape("traffic sign", "rim", outer), Shape("traffic sign", "board", inner)]


_POST = [Shape("pole", "metal", [(0, 0), (0, 2.8)], 0.13)]
_BICYCLE = [
    *(Shape("bicycle", "tyre", ring(x, 0.34, 0.34, 16), 0.06) for x in (-0.53, 0.53)),
    Shape("bicycle", "frame", [(-0.53, 0.34), (-0.2, 0.95), (0, 0.34), (-0.53, 0.34)], 0.06),
    Shape("bicycle", "frame", [(0, 0.34), (0.43, 1.02), (0.53, 0.34)], 0.06),
    Shape("bicycle", "frame", [(-0.2, 0.95), (0.43, 1.02)], 0.06),
]
FIGURES: dict[str, list[Shape]] = {
    "person": [
        Shape("person", "trousers", [(-0.1, 0.85), (0.02, 0.85), (-0.1, 0), (-0.26, 0)]),
        Shape("person", "trousers", [(-0.02, 0.85), (0.1, 0.85), (0.26, 0), (0.1, 0)]),
        *(Shape("person", "coat", [(out * 0.2, 1.4), (out * 0.32, 0.85)], 0.11) for out in (-1, 1)),
        Shape("person", "coat", [(-0.24, 1.42), (0, 1.53), (0.24, 1.42), (0.17, 0.75), (-0.17, 0.75)]),
        Shape("person", "hair", ring(0, 1.6, 0.13)),
        Shape("person", "skin", ring(0.02, 1.56, 0.095)),
    ],
    "bicycle": _BICYCLE,
    "cyclist": [
        *_BICYCLE,
        Shape("rider", "trousers", [(-0.2, 0.95), (0.25, 0.75), (0.05, 0.3)], 0.17),
        Shape("rider", "coat", [(-0.2, 1), (0.15, 1.5)], 0.33),
        Shape("rider", "skin", [(0.15, 1.45), (0.38, 1.25), (0.43, 1.02)], 0.1),
        Shape("rider", "hair", ring(0.21, 1.76, 0.14)),
    ],
    "post": _POST,
    "lamp": [
        Shape("pole", "metal", [(0, 0), (0, 7), (1.5, 7.2)], 0.13),
        Shape("pole", "bulb", [(1.2, 7.1), (1.8, 7.1), (1.8, 7.3), (1.2, 7.3)]),
    ],
    "traffic light": [
        *_POST,
        Shape("traffic light", "case", [(-0.2, 2.2), (0.2, 2.2), (0.2, 3.2), (-0.2, 3.2)]),
        *(
            Shape("traffic light", colour, ring(0, height, 0.12))
            for colour, height in (("red", 3), ("amber", 2.7), ("green", 2.4))
        ),
    ],
    "bin": [Shape("static", "bin", [(-0.4, 0), (0.4, 0), (0.45, 1.1), (-0.45, 1.1)])],
    **{f"sign {corners}": _sign(corners) for corners in (3, 4, 8, 16)},
}


def draw_figure(canvas: Canvas, rng: np.random.Generator, x: float, z: float, kind: str, ahead: int) -> None:
    """A figure of the table, some larger or smaller, that looks to the left (-1) or right (+1)."""
    wide, tall = rng.uniform(0.85, 1.15, 2)
    colours = {name: tone(rng, _COLOURS[name]) for name in dict.fromkeys(p.colour for p in FIGURES[kind])}
    for part in FIGURES[kind]:
        points = [(x + ahead * wide * along, tall * up, z) for along, up in part.points]
        canvas.draw(points, colours[part.colour], part.label, part.width)


def tone(rng: np.random.Generator, colours: list[tuple[int, int, int]], spread: float = 0.2) -> Colour:
    """One of the colours, changed a little."""
    return np.array(colours[rng.integers(len(colours))]) * rng.uniform(1 - spread, 1 + spread)


def draw_tree(
    canvas: Canvas, rng: np.random.Generator, x: float, z: float, leaves: Colour, scale: float = 1.0
) -> None:
    """A trunk and a crown of ragged clumps, all labelled vegetation; `scale` below 1 makes shrubs of it."""
    tall = rng.uniform(4.5, 9.0) * scale
    crown, count = tall * rng.uniform(0.24, 0.36), int(rng.integers(6, 11))
    canvas.draw([(x, 0, z), (x, tall - crown, z)], tone(rng, [(74, 60, 48)]), "vegetation", 0.35 * scale)
    around, away = rng.uniform(0, 2 * np.pi, count), crown * rng.uniform(0.1, 0.75, count)
    middles = np.stack([x + away * np.cos(around), tall - crown + away * np.sin(around), around * 0 + z], 1)
    disc = np.array([(*point, 0) for point in ring(0, 0, crown, 22)[:-1]])
    lit_from = crown * np.array((0.15 * canvas.view.sun_side, 0.15, 0))
    for move, size, light in ((0, 0.5, 0.65), (lit_from, 0.28, 1 + 0.3 * canvas.view.contrast)):
        ragged = disc * size * rng.uniform(0.72, 1.15, (count, 22, 1)) + (middles + move)[:, None]
        canvas.draw(ragged, leaves * light * rng.uniform(0.85, 1.15, (count, 1)), "vegetation")


# length, width, height of the whole and of its lower part, m
VEHICLES = {"car": (4.2, 1.8, 1.6, 0.9), "truck": (7.5, 2.4, 3.2, 1.2), "bus": (10.5, 2.5, 3.0, 1.3)}


def draw_vehicle(canvas: Canvas, rng: np.random.Generator, x: float, z: float, kind: str) -> None:
    """A car, truck or bus whose near end stands at depth z, its middle at x."""
    length, width, height, sill = np.array(VEHICLES[kind]) * rng.uniform(0.9, 1.1, 4)
    left, right, far = x - width / 2, x + width / 2, z + length
    paint, glass, dark = tone(rng, PAINTS), tone(rng, [(48, 56, 66)], 0.4), np.array((28.0, 28.0, 30.0))
    radius = 0.33 if kind == "car" else 0.48
    canvas.draw(rectangle((left - 0.2, right + 0.2), 0, (z - 0.2, far)), dark)
    canvas.box((left, right), (0.25, sill), (z, far), paint, kind)
    for wheel in (left, right - 0.24):
        canvas.draw(rectangle((wheel, wheel + 0.24), (0, 1.6 * radius), z), dark, kind)
    inner = left if x > 0 else right  # the side towards the middle of the street
    for middle in (z + 2.3 * radius, far - 2.3 * radius):
        canvas.draw([(inner, up, middle + along) for along, up in ring(0, radius, radius)], dark, kind)
    if kind == "car":
        foot = [(a, sill, c) for a in (left + 0.04, right - 0.04) for c in (z, far - 0.8)]
        roof = [(a, height, c) for a in (left + 0.18, right - 0.18) for c in (z + 0.35, far - 1.5)]
        canvas.draw([*foot, *roof], paint * canvas.view.shade(-1 if x > 0 else 1), kind, solid=True)
        pane = [(left + 0.12, sill + 0.04, z), (right - 0.12, sill + 0.04, z)]
        canvas.draw([*pane, (right - 0.3, height - 0.1, z + 0.3), (left + 0.3, height - 0.1, z + 0.3)], glass)
    else:
        canvas.box((left, right), (sill, height), (z, far), paint, kind)
        if kind == "bus" or rng.random() < 0.5:
            window = (height - 1.3, height - 0.3)
            canvas.draw(rectangle((left + 0.15, right - 0.15), window, z), glass)
            canvas.draw(rectangle(inner, window, (z + 0.4, far - 0.4)), glass)
    lamp = (176, 34, 30) if rng.random() < 0.6 else (236, 232, 214)  # seen from behind or from the front
    for start in (left + 0.05, right - 0.37):
        canvas.draw(rectangle((start, start + 0.32), (sill - 0.25, sill - 0.08), z), lamp)
    canvas.draw(rectangle((x - 0.26, x + 0.26), (0.45, 0.57), z), (214, 214, 206))
