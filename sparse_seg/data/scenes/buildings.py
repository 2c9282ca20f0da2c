"""What lines the street: buildings with windows, walls, fences."""

import numpy as np
from numpy.typing import NDArray

from sparse_seg.data.scenes.canvas import Canvas, Colour, along, box, facing

_FACADES = np.array(
    [
        (176, 160, 138), (150, 92, 74), (196, 188, 176), (128, 122, 118), (170, 142, 104), (112, 84, 72),
        (140, 148, 156), (206, 192, 160), (98, 100, 106), (160, 118, 96), (122, 132, 110),
    ],
    dtype=float,
)  # fmt: skip
_FLOOR_HEIGHT = 3.1  # m


def draw_building(
    canvas: Canvas, rng: np.random.Generator, side: int, x: float, z: tuple[float, float]
) -> None:
    """A building on the left (side -1) or right (+1); its street front stands at |x|, depth z[0] to z[1].

    Ends that face the camera are visible where the building before it stands back or is lower.
    """
    height = _FLOOR_HEIGHT * rng.integers(2, 7) + rng.uniform(0.5, 1.5)
    colour = facade_colour(rng)
    front, end = side * x, side * (x + 12)
    end_x = (min(front, end), max(front, end))
    canvas.polygon(facing(end_x, (0, height), z[0]), colour * canvas.light.shade(0), "building")
    street = colour * canvas.light.shade(-side)
    canvas.polygon(along(front, (0, height), z), street, "building")
    canvas.polygon(along(front, (height - rng.uniform(0.3, 0.8), height), z), street * rng.uniform(0.6, 1.2))
    ground_floor = rng.uniform(3, 4)
    if rng.random() < 0.5:
        canvas.polygon(along(front, (0, ground_floor), z), facade_colour(rng) * canvas.light.shade(-side))
    _draw_windows(canvas, rng, front, z, ground_floor, height)
    _draw_end_windows(canvas, rng, end_x, z[0], height)


def draw_far_end(canvas: Canvas, rng: np.random.Generator, z: float, half_width: float) -> None:
    """The row of buildings that closes the street at depth z."""
    x = -half_width
    while x < half_width:
        width = rng.uniform(8, 20)
        height = _FLOOR_HEIGHT * rng.integers(2, 7)
        span = (x, x + width + 0.2)
        canvas.polygon(facing(span, (0, height), z), facade_colour(rng) * canvas.light.shade(0), "building")
        _draw_end_windows(canvas, rng, span, z, height)
        x += width


def facade_colour(rng: np.random.Generator) -> Colour:
    return _FACADES[rng.integers(len(_FACADES))] * rng.uniform(0.65, 1.15) + rng.normal(0, 8, 3)


def _draw_windows(
    canvas: Canvas, rng: np.random.Generator, x: float, z: tuple[float, float], base: float, height: float
) -> None:
    spacing = rng.uniform(2.0, 3.6)
    depths = np.arange(z[0] + 0.6, z[1] - spacing * 0.6, spacing)
    floors = np.arange(base, height - 2.2, _FLOOR_HEIGHT)
    wide, tall = spacing * rng.uniform(0.35, 0.65), rng.uniform(1.3, 2.1)
    start, bottom = (grid.ravel() for grid in np.meshgrid(depths, floors + 0.6))
    panes = np.stack([along(0, (0, tall), (0, wide))] * start.size) if start.size else np.empty((0, 4, 3))
    panes[..., 0] = x
    panes[..., 1] += bottom[:, None]
    panes[..., 2] += start[:, None]
    _paint_panes(canvas, rng, panes)
    doors = along(x, (0, base - rng.uniform(0.5, 0.9)), (0, spacing * 0.8))[None].repeat(depths.size, 0)
    doors[..., 2] += depths[:, None]
    _paint_panes(canvas, rng, doors)


def _draw_end_windows(
    canvas: Canvas, rng: np.random.Generator, x: tuple[float, float], z: float, height: float
) -> None:
    spacing, wide, tall = rng.uniform(2.5, 4.0), rng.uniform(0.9, 1.5), rng.uniform(1.2, 1.9)
    if rng.random() < 0.25:  # a blind end
        return
    columns, floors = np.meshgrid(
        np.arange(x[0] + 1, x[1] - wide, spacing), np.arange(1, height - 2.2, _FLOOR_HEIGHT)
    )
    panes = facing((0, wide), (0, tall), z)[None].repeat(columns.size, 0)
    panes[..., 0] += columns.reshape(-1, 1)
    panes[..., 1] += floors.reshape(-1, 1)
    _paint_panes(canvas, rng, panes)


def _paint_panes(canvas: Canvas, rng: np.random.Generator, panes: NDArray[np.float64]) -> None:
    """Each pane reflects the sky, stays dark or shows a blind."""
    glass = np.array([(52, 58, 66), (84, 96, 112), (196, 192, 180)]) * rng.uniform(0.7, 1.2, (3, 1))
    kind = rng.choice(3, len(panes), p=(0.6, 0.25, 0.15))
    for index, colour in enumerate(glass):
        canvas.polygons(panes[kind == index], colour)


def draw_wall(canvas: Canvas, rng: np.random.Generator, side: int, x: float, z: tuple[float, float]) -> None:
    """A garden wall along the street."""
    height = rng.uniform(1.4, 2.8)
    colour = facade_colour(rng)
    front = side * x
    ends = (min(front, front + side * 0.4), max(front, front + side * 0.4))
    canvas.hull(box(ends, (0, height), z), colour * canvas.light.shade(-side), "wall")
    canvas.polygon(facing(ends, (0, height), z[0]), colour * canvas.light.shade(0))
    canvas.polygon(along(front, (height - 0.2, height), z), colour * 0.8)


def draw_fence(canvas: Canvas, rng: np.random.Generator, side: int, x: float, z: tuple[float, float]) -> None:
    """A fence of bars; what shows between them is labelled fence too, as in Cityscapes."""
    height = rng.uniform(1.0, 1.8)
    before = canvas.image.copy()
    colour = np.array(rng.choice([60, 110, 170])) + rng.normal(0, 12, 3)
    canvas.polygon(along(side * x, (0, height), z), colour, "fence")
    if rng.random() < 0.75:
        canvas.image = before
        bars = along(side * x, (0, height), (0, 0.12))[None].repeat(int((z[1] - z[0]) / 0.35), 0)
        bars[..., 2] += z[0] + 0.35 * np.arange(len(bars))[:, None]
        canvas.polygons(bars, colour)
        for y in (0.15, height - 0.12):
            canvas.polygon(along(side * x, (y, y + 0.12), z), colour)
