"""Puts a street together: draws a random plan, paints it from far to near, then photographs it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from sparse_seg.data.dataset import Image
from sparse_seg.data.scenes.canvas import LABEL_IDS, Canvas, Colour, Span, View, band, copies, rectangle
from sparse_seg.data.scenes.optics import photograph, smooth_noise
from sparse_seg.data.scenes.things import draw_figure, draw_tree, draw_vehicle, tone

_FAR = 220.0  # m, where the ground meets the horizon
_FLOOR = 3.1  # m
_FACADES = [(176, 160, 138), (150, 92, 74), (196, 188, 176), (128, 122, 118), (112, 84, 72), (140, 148, 156)]
_FACADES += [(206, 192, 160), (98, 100, 106), (122, 132, 110)]
_LEAVES = [(70, 96, 44), (88, 104, 52), (54, 78, 48), (130, 104, 50), (104, 92, 70)]
_POLES = ["post", "lamp", "lamp", "traffic light", "sign 3", "sign 4", "sign 8", "sign 16"]


@dataclass(frozen=True)
class _Plan:
    """One street; metres, x from the camera."""

    middle: float  # x of the road's middle
    road: float  # half its width
    front: float  # half the distance of the building lines; pavements lie between them and the road
    near: float  # depth of the image's lower border
    end: float  # depth of the street's far end
    density: float  # how full the street is, 0..1
    built: float  # share of lots with a building
    leaves: Colour


def render_scene(
    rng: np.random.Generator, size: tuple[int, int] = (256, 512), beyond: int = 0
) -> tuple[Image, Image]:
    """One street scene.

    Args:
        rng: the only source of randomness.
        size: height and width of what the camera sees, px.
        beyond: px to add at the right border, for a camera that turns.

    Returns:
        Image `[H, W + beyond, 3]` uint8 RGB and label ids of Cityscapes `[H, W + beyond]` uint8. All
        evaluated classes occur but train and motorcycle; `static` and `ego vehicle` occur as ignored ids.
    """
    canvas = Canvas((size[0], size[1] + beyond), _draw_view(rng, size))
    plan = _draw_plan(rng, canvas)
    _paint_sky(canvas, rng)
    _paint_ground(canvas, rng, plan)
    if rng.random() < 0.6:  # buildings close the street
        for x in range(-70, 70, 14):
            _building(canvas, rng, (x, x + 14.2), (plan.end, plan.end + 10))
    for side in (-1, 1):
        _paint_lots(canvas, rng, plan, side)
    for _, draw in sorted(_objects(canvas, rng, plan), key=lambda item: -item[0]):
        draw()
    if rng.random() < 0.25:
        _paint_bonnet(canvas, rng)
    return photograph(canvas.image, canvas.label, rng), canvas.label


def _draw_view(rng: np.random.Generator, size: tuple[int, int]) -> View:
    sunny = rng.random() < 0.6
    return View(
        focal=size[1] * rng.uniform(0.7, 1.0),
        centre=size[1] * rng.uniform(0.4, 0.6),
        horizon=size[0] * rng.uniform(0.38, 0.5),
        height=rng.uniform(1.2, 1.9),
        bend=rng.normal(0, 0.0006),
        sun_side=int(rng.choice([-1, 1])),
        contrast=rng.uniform(0.25, 0.45) if sunny else rng.uniform(0, 0.1),
        haze=rng.uniform(150, 215) + np.array((-8.0, 0.0, 10.0)),
        haze_depth=rng.uniform(150, 500) if sunny else rng.uniform(70, 300),
    )


def _draw_plan(rng: np.random.Generator, canvas: Canvas) -> _Plan:
    road, view = rng.uniform(3.2, 7.5), canvas.view
    return _Plan(
        middle=-road * rng.uniform(-0.1, 0.6),
        road=road,
        front=road + rng.uniform(2.0, 5.0),
        near=0.95 * view.focal * view.height / (len(canvas.label) - view.horizon),
        end=rng.uniform(55, 140),
        density=rng.uniform(0.15, 1.0),
        built=rng.uniform(0.45, 1.0),
        leaves=tone(rng, _LEAVES),
    )


def _paint_sky(canvas: Canvas, rng: np.random.Generator) -> None:
    size, sunny = canvas.label.shape, canvas.view.contrast > 0.1
    top = np.array((88, 134, 196) if sunny else (168, 174, 182)) * rng.uniform(0.75, 1.2)
    low = np.array((196, 212, 228) if sunny else (206, 208, 210)) * rng.uniform(0.85, 1.12)
    down = np.clip(np.arange(size[0]) / canvas.view.horizon, 0, 1)[:, None, None]
    cover = smooth_noise(rng, size, 8) + 0.6 * smooth_noise(rng, size, 24)
    clouds = np.clip(cover * rng.uniform(0.3, 0.8) + rng.uniform(-0.8, 0.3), 0, 1)[..., None]
    sky = top + (low - top) * down
    canvas.image[:] = np.clip(sky + (236 * rng.uniform(0.8, 1.05) - sky) * clouds, 0, 255)


def _paint_ground(canvas: Canvas, rng: np.random.Generator, plan: _Plan) -> None:
    depths = np.geomspace(plan.near, _FAR, 16)
    grass, stone, tar = (
        plan.leaves * rng.uniform(0.9, 1.3),
        rng.uniform(95, 175) + rng.normal(0, 8, 3),
        rng.uniform(62, 130) + rng.normal(0, 5, 3),
    )
    canvas.image[int(canvas.view.horizon) :] = canvas.view.haze * 0.4 + grass * 0.6
    canvas.label[int(canvas.view.horizon) :] = LABEL_IDS["terrain"]

    def paint(x: Span, where: np.ndarray, colour: Colour, label: str | None = None) -> None:
        canvas.draw(band(plan.middle + x[0], plan.middle + x[1], where), colour, label)

    paint((-60, 60), depths, grass)
    paint((-plan.front, plan.front), depths, stone, "sidewalk")
    paint((-plan.road - 0.15, plan.road + 0.15), depths, stone * rng.uniform(0.7, 1.25), "sidewalk")
    paint((-plan.road, plan.road), depths, tar, "road")
    for _ in range(rng.integers(2, 9)):  # repairs
        x, z = rng.uniform(-plan.road, plan.road * 0.8), rng.uniform(plan.near, 45)
        patch = np.array((z, z + rng.uniform(0.6, 7)))
        paint((x, min(x + rng.uniform(0.4, 2.2), plan.road)), patch, tar * rng.uniform(0.8, 1.18))
    white = rng.uniform(165, 235) + np.array((0, 0, rng.choice([0, 0, -60])))
    if rng.random() < 0.8:
        for x in (0.0,) if plan.road < 5.5 else (-plan.road / 2, 0.0, plan.road / 2):
            for z in np.arange(plan.near + rng.uniform(0, 3), 90, rng.uniform(4, 10)):
                paint((x - 0.07, x + 0.07), np.array((z, z + 3)), white)
    if rng.random() < 0.4:
        for x in (-plan.road + 0.35, plan.road - 0.45):
            paint((x, x + 0.12), depths, white)
    if rng.random() < 0.3:  # a crossing
        z = rng.uniform(plan.near + 3, 30)
        for x in np.arange(-plan.road + 0.3, plan.road - 0.5, 1.0):
            paint((x, x + 0.5), np.array((z, z + 3)), white)
    if canvas.view.contrast > 0.1:  # roofs of different height throw shadows over the street
        side, depths = canvas.view.sun_side, np.geomspace(plan.near, plan.end, 24)
        reach = plan.front - np.repeat(rng.uniform(0.1, 1.0, 8), 3) * (plan.front + 0.3 * plan.road)
        shadow = band(plan.middle + side * plan.front, plan.middle + side * reach, depths)
        canvas.cast_shadow(shadow, canvas.view.contrast + 0.15)


def _paint_lots(canvas: Canvas, rng: np.random.Generator, plan: _Plan, side: int) -> None:
    """The plots on the left (-1) or right (+1), from the far end towards the camera."""
    far = plan.end
    while far > 4:
        near = max(far - rng.uniform(8, 24), 2.0)
        x = plan.middle + side * (plan.front + rng.choice([0.0, 0.0, rng.uniform(0.5, 5)]))
        if rng.random() < plan.built:
            _building(canvas, rng, (min(x, x + side * 12), max(x, x + side * 12)), (near, far))
        else:
            for z in sorted(rng.uniform(near + 1, far, rng.integers(2, 8)))[::-1]:
                away = side * rng.uniform(1.5, 16)
                draw_tree(canvas, rng, x + away, float(z), plan.leaves, rng.choice([1.0, 1.0, 0.35]))
            if near > 3:  # nearer, it would fill the image
                _border(canvas, rng, x, (near, far))
        far = near - rng.choice([0.0, 0.0, 0.0, rng.uniform(1, 8)])


def _building(canvas: Canvas, rng: np.random.Generator, x: Span, z: Span) -> None:
    """A building; its near end shows where the one before it stands back or is lower."""
    floors = rng.integers(2, 7)
    height = _FLOOR * floors + rng.uniform(0.5, 1.5)
    front, faces = (x[0], -1) if x[0] > 0 else (x[1], 1)
    canvas.box(x, (0, height), z, tone(rng, _FACADES, 0.3) + rng.normal(0, 8, 3), "building")
    for low, high, chance in ((height - 0.5, height, 1.0), (0, rng.uniform(3, 4), 0.5)):  # cornice, shops
        if rng.random() < chance:
            other = tone(rng, _FACADES, 0.3) * canvas.view.shade(faces)
            canvas.draw(rectangle(front, (low, high), z), other)
    wide, tall, step = rng.uniform(0.9, 1.7), rng.uniform(1.2, 2.1), rng.uniform(2.2, 4.0)
    glass = np.array([(52, 58, 66), (84, 96, 112), (196, 192, 180)]) * rng.uniform(0.7, 1.2, (3, 1))
    levels = 1 + _FLOOR * np.arange(floors)
    street = np.array([(front, up, at) for at in np.arange(z[0] + 0.6, z[1] - wide, step) for up in levels])
    end = np.array([(at, up, z[0]) for at in np.arange(x[0] + 1, x[1] - wide, step) for up in levels])
    for pane, places in (((0, (0, tall), (0, wide)), street), (((0, wide), (0, tall), 0), end)):
        if len(places) and rng.random() < 0.9:
            colours = glass[rng.choice(3, len(places), p=(0.6, 0.25, 0.15))]
            canvas.draw(copies(rectangle(*pane), places), colours)


def _border(canvas: Canvas, rng: np.random.Generator, x: float, z: Span) -> None:
    """A garden's wall, or its fence; what shows between the bars is labelled fence too, as in Cityscapes."""
    kind, height = rng.choice(["wall", "fence", ""], p=(0.25, 0.4, 0.35)), rng.uniform(1.0, 2.2)
    if kind == "wall":
        canvas.box((x - 0.2, x + 0.2), (0, height), z, tone(rng, _FACADES, 0.3), "wall")
    elif kind == "fence":
        behind, bars = canvas.image.copy(), np.arange(z[0], z[1], 0.35)
        colour = rng.uniform(50, 180) + rng.normal(0, 12, 3)
        canvas.draw(rectangle(x, (0, height), z), colour, "fence")
        canvas.image = behind
        canvas.draw(copies(rectangle(0, (0, height), (0, 0.12)), [(x, 0, bar) for bar in bars]), colour)
        for y in (0.15, height - 0.12):
            canvas.draw(rectangle(x, (y, y + 0.12), z), colour)


def _objects(canvas: Canvas, rng: np.random.Generator, plan: _Plan) -> list[tuple[float, Callable[[], None]]]:
    """(depth, how to draw it) of all that stands on the road and the pavements."""
    items, full = list[tuple[float, Callable[[], None]]](), plan.density

    def put(draw: Callable[..., None], x: float, z: float, *more: object) -> None:
        items.append((z, functools.partial(draw, canvas, rng, plan.middle + x, z, *more)))

    def row(first: float, last: float, step: Span) -> np.ndarray:
        return np.arange(plan.near + rng.uniform(1, first), last, rng.uniform(*step))

    for side in (-1, 1):
        for z in row(15, 110, (12, 30)):
            if rng.random() < 0.25 + 0.6 * full:
                kind = str(rng.choice(["car", "truck", "bus"], p=(0.86, 0.08, 0.06)))
                put(draw_vehicle, side * plan.road / 2 + rng.normal(0, 0.25), z + rng.uniform(0, 8), kind)
        if plan.road > 4.2 and rng.random() < 0.6:  # parked
            for z in row(8, 90, (5.5, 9)):
                if rng.random() < 0.3 + 0.5 * full:
                    put(draw_vehicle, side * (plan.road - 1.0), z, "car")
        for z in row(12, 100, (9, 26)):
            put(draw_figure, side * (plan.road + rng.uniform(0.3, 0.8)), z, str(rng.choice(_POLES)), -side)
        if rng.random() < 0.45:
            for z in row(14, 110, (7, 16)):
                put(draw_tree, side * (plan.road + rng.uniform(0.9, 1.6)), z, plan.leaves)
        for z in rng.uniform(plan.near + 3, 50, rng.poisson(0.8)):
            put(draw_figure, side * (plan.front - 0.5), float(z), "bin", 1)
    for kind, on_road, expected in (
        ("person", 0.12, 2 + 9 * full),
        ("cyclist", 1.0, 0.2 + 0.8 * full),
        ("bicycle", 0.0, 0.1 + 0.4 * full),
    ):
        for _ in range(rng.poisson(expected)):
            x = rng.choice([-1, 1]) * rng.uniform(plan.road + 0.3, plan.front - 0.3)
            x = rng.uniform(-plan.road, plan.road) if rng.random() < on_road else x
            put(draw_figure, x, plan.near + 2 + rng.gamma(2, 9), kind, int(rng.choice([-1, 1])))
    return items


def _paint_bonnet(canvas: Canvas, rng: np.random.Generator) -> None:
    """The camera car's own bonnet at the lower border."""
    rows, columns = canvas.label.shape
    middle = (int(columns * rng.uniform(0.45, 0.55)), rows)
    axes = (int(columns * rng.uniform(0.45, 0.6)), int(rows * rng.uniform(0.05, 0.1)))
    grey = rng.uniform(25, 150)
    cv2.ellipse(canvas.image, middle, axes, 0, 0, 360, (grey, grey, grey), cv2.FILLED)
    cv2.ellipse(canvas.label, middle, axes, 0, 0, 360, LABEL_IDS["ego vehicle"], cv2.FILLED)
