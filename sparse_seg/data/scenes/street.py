"""Puts a street together: draws a random plan, paints it from far to near, then photographs it."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from sparse_seg.data.dataset import Image
from sparse_seg.data.scenes.buildings import draw_building, draw_far_end, draw_fence, draw_wall
from sparse_seg.data.scenes.canvas import LABEL_IDS, Camera, Canvas, Colour, Light, strip
from sparse_seg.data.scenes.objects import draw_bin, draw_cyclist, draw_person, draw_pole, draw_tree
from sparse_seg.data.scenes.optics import photograph, smooth_noise
from sparse_seg.data.scenes.vehicles import draw_vehicle

_FAR = 220.0  # m, where the ground meets the horizon


@dataclass(frozen=True)
class _Plan:
    """What one street looks like; metres, x from the middle of the road."""

    road: float
    """Half the road's width."""
    front: float
    """|x| of the building line; the pavement lies between it and the road."""
    eye: float
    """x of the camera."""
    near: float
    end: float
    """Depth of the lower border of the image and of the street's far end."""
    density: float
    """How full the street is, 0..1."""
    built: float
    """Share of lots with a building."""
    foliage: Colour


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
    camera, light = _draw_camera(rng, size), _draw_light(rng)
    plan = _draw_plan(rng, camera, size)
    canvas = Canvas((size[0], size[1] + beyond), camera, light)
    _paint_sky(canvas, rng)
    _paint_ground(canvas, rng, plan)
    if rng.random() < 0.6:
        draw_far_end(canvas, rng, plan.end, 70)
    for side in rng.permutation([-1, 1]):
        _paint_lots(canvas, rng, plan, int(side))
    for _, draw in sorted(_objects(canvas, rng, plan), key=lambda item: -item[0]):
        draw()
    if rng.random() < 0.25:
        _paint_bonnet(canvas, rng)
    return photograph(canvas.image, canvas.label, rng), canvas.label


def _draw_camera(rng: np.random.Generator, size: tuple[int, int]) -> Camera:
    rows, columns = size
    return Camera(
        focal=columns * rng.uniform(0.7, 1.0),
        centre=columns * rng.uniform(0.4, 0.6),
        horizon=rows * rng.uniform(0.38, 0.5),
        height=rng.uniform(1.2, 1.9),
        bend=rng.normal(0, 0.0006),
    )


def _draw_light(rng: np.random.Generator) -> Light:
    sunny = rng.random() < 0.6
    return Light(
        sun_side=int(rng.choice([-1, 1])),
        contrast=rng.uniform(0.25, 0.45) if sunny else rng.uniform(0, 0.1),
        haze=rng.uniform(150, 215) + np.array((-8.0, 0.0, 10.0)),
        haze_depth=rng.uniform(150, 500) if sunny else rng.uniform(70, 300),
    )


def _draw_plan(rng: np.random.Generator, camera: Camera, size: tuple[int, int]) -> _Plan:
    road = rng.uniform(3.2, 7.5)
    tones = np.array([(70, 96, 44), (88, 104, 52), (54, 78, 48), (130, 104, 50), (104, 92, 70)], dtype=float)
    return _Plan(
        road=road,
        front=road + rng.uniform(2.0, 5.0),
        eye=road * rng.uniform(-0.1, 0.6),
        near=camera.nearest(size[0]) * 0.95,
        end=rng.uniform(55, 140),
        density=rng.uniform(0.15, 1.0),
        built=rng.uniform(0.45, 1.0),
        foliage=tones[rng.choice(5, p=(0.3, 0.3, 0.2, 0.1, 0.1))],
    )


def _paint_sky(canvas: Canvas, rng: np.random.Generator) -> None:
    rows, columns = canvas.label.shape
    sunny = canvas.light.contrast > 0.1
    rows = min(max(int(canvas.camera.horizon) + 2, 2), rows)  # buildings or ground cover the rest
    zenith = np.array((88, 134, 196) if sunny else (168, 174, 182)) * rng.uniform(0.75, 1.2)
    low = np.array((196, 212, 228) if sunny else (206, 208, 210)) * rng.uniform(0.85, 1.12)
    cloud = np.array((236, 236, 236)) * rng.uniform(0.8, 1.05)
    height = np.clip(np.arange(rows) / canvas.camera.horizon, 0, 1)[:, None, None]
    cover = smooth_noise(rng, (rows, columns), 5) + 0.6 * smooth_noise(rng, (rows, columns), 14)
    share = np.clip(cover * rng.uniform(0.3, 0.8) + rng.uniform(-0.8, 0.3), 0, 1)[..., None]
    sky = zenith + (low - zenith) * height
    canvas.image[:rows] = np.clip(sky + (cloud - sky) * share, 0, 255)


def _paint_ground(canvas: Canvas, rng: np.random.Generator, plan: _Plan) -> None:
    horizon = max(int(canvas.camera.horizon), 0)
    grass = plan.foliage * rng.uniform(0.8, 1.2) + (20, 18, 4)
    canvas.image[horizon:] = canvas.light.haze * 0.4 + grass * 0.6
    canvas.label[horizon:] = LABEL_IDS["terrain"]
    depths = np.geomspace(plan.near, _FAR, 40)
    wide, road = plan.front, plan.road
    canvas.polygon(strip(-60 - plan.eye, 60 - plan.eye, depths), grass)
    stone = rng.uniform(95, 175) + rng.normal(0, 8, 3)
    tar = rng.uniform(62, 130) + rng.normal(0, 5, 3)
    _paint_bands(canvas, plan, -wide, wide, depths, stone, "sidewalk")
    _paint_bands(canvas, plan, -road - 0.15, road + 0.15, depths, stone * rng.uniform(0.7, 1.25), "sidewalk")
    _paint_bands(canvas, plan, -road, road, depths, tar, "road")
    _paint_wear(canvas, rng, plan, tar)
    _paint_markings(canvas, rng, plan)
    _cast_shadows(canvas, rng, plan)


def _paint_bands(
    canvas: Canvas,
    plan: _Plan,
    left: float,
    right: float,
    depths: np.ndarray,
    colour: Colour,
    label: str | None,
) -> None:
    """A band along the street, in slices, so that the haze grows with depth."""
    for start in range(0, len(depths) - 1, 3):
        canvas.polygon(strip(left - plan.eye, right - plan.eye, depths[start : start + 4]), colour, label)


def _paint_wear(canvas: Canvas, rng: np.random.Generator, plan: _Plan, tar: Colour) -> None:
    """Repaired patches and manhole covers."""
    for _ in range(rng.integers(2, 9)):
        x, z = rng.uniform(-plan.road, plan.road * 0.8), rng.uniform(plan.near, 45)
        length, width = rng.uniform(0.6, 7), rng.uniform(0.4, 2.2)
        right = min(x + width, plan.road)
        patch = strip(x - plan.eye, right - plan.eye, np.array((z, z + length)))
        canvas.polygon(patch, tar * rng.uniform(0.8, 1.18))


def _paint_markings(canvas: Canvas, rng: np.random.Generator, plan: _Plan) -> None:
    paint = rng.uniform(165, 235) + np.array((0, 0, rng.choice([0, 0, -60])))
    if rng.random() < 0.8:
        dash, gap = rng.uniform(2, 4), rng.uniform(2, 6)
        lanes = [0.0] if plan.road < 5.5 else [-plan.road / 2, 0.0, plan.road / 2]
        for x in lanes:
            for z in np.arange(plan.near + rng.uniform(0, 3), 90, dash + gap):
                _paint_bands(canvas, plan, x - 0.07, x + 0.07, np.linspace(z, z + dash, 2), paint, None)
    if rng.random() < 0.4:
        depths = np.geomspace(plan.near, 120, 16)
        for x in (-plan.road + 0.35, plan.road - 0.45):
            _paint_bands(canvas, plan, x, x + 0.12, depths, paint, None)
    if rng.random() < 0.3:
        z = rng.uniform(plan.near + 3, 30)
        for x in np.arange(-plan.road + 0.3, plan.road - 0.5, 1.0):
            _paint_bands(canvas, plan, x, x + 0.5, np.array((z, z + 3)), paint, None)


def _cast_shadows(canvas: Canvas, rng: np.random.Generator, plan: _Plan) -> None:
    if canvas.light.contrast < 0.1:
        return
    depths = np.geomspace(plan.near, plan.end, 24)
    steps = np.repeat(rng.uniform(0.1, 1.0, 8), 3)  # roofs of different height
    reach = plan.front - steps * (plan.front + plan.road * rng.uniform(-0.4, 1.0))
    side = canvas.light.sun_side
    shadows = [strip(side * plan.front - plan.eye, side * reach - plan.eye, depths)]
    for _ in range(rng.integers(0, 5)):
        x, z = rng.uniform(-plan.road, plan.road), rng.uniform(plan.near, 40)
        turn = np.linspace(0, 2 * np.pi, 14)[:-1]
        ragged = rng.uniform(0.6, 1.2, 13)
        blob = np.stack(
            [x + 2.4 * ragged * np.cos(turn), 0 * turn, z + 3 + 2.6 * ragged * np.sin(turn)], axis=1
        )
        shadows.append(blob)
    canvas.darken_ground(shadows, canvas.light.contrast + 0.15)


def _paint_lots(canvas: Canvas, rng: np.random.Generator, plan: _Plan, side: int) -> None:
    """The plots on one side, from the far end towards the camera."""
    far = plan.end
    while far > 4:
        near = max(far - rng.uniform(8, 24), 2.0)
        setback = rng.choice([0.0, 0.0, rng.uniform(0.5, 5)])
        x = plan.front + setback - side * plan.eye
        if rng.random() < plan.built:
            draw_building(canvas, rng, side, x, (near, far))
        else:
            _paint_garden(canvas, rng, plan, side, (near, far))
        far = near - rng.choice([0.0, 0.0, 0.0, rng.uniform(1, 8)])


def _paint_garden(
    canvas: Canvas, rng: np.random.Generator, plan: _Plan, side: int, z: tuple[float, float]
) -> None:
    x = plan.front - side * plan.eye
    for depth in sorted(rng.uniform(z[0] + 1, z[1], rng.integers(2, 8)))[::-1]:
        scale = rng.choice([1.0, 1.0, 0.35])
        draw_tree(canvas, rng, side * (x + rng.uniform(1.5, 16)), float(depth), plan.foliage, scale)
    if z[0] < 3:  # too near to draw a border that would fill the image
        return
    border = rng.random()
    if border < 0.4:
        draw_fence(canvas, rng, side, x + 0.1, z)
    elif border < 0.65:
        draw_wall(canvas, rng, side, x + 0.1, z)


_Drawable = tuple[float, Callable[[], None]]


def _objects(canvas: Canvas, rng: np.random.Generator, plan: _Plan) -> list[_Drawable]:
    """(depth, how to draw it) of all that stands on the road and the pavements."""
    items: list[_Drawable] = []

    def put(draw: Callable[..., None], x: float, z: float, *details: object) -> None:
        items.append((z, lambda: draw(canvas, rng, x - plan.eye, z, *details)))

    _put_traffic(put, rng, plan)
    _put_people(put, rng, plan)
    _put_furniture(put, rng, plan)
    return items


_Put = Callable[..., None]


def _put_traffic(put: _Put, rng: np.random.Generator, plan: _Plan) -> None:
    lane = plan.road * 0.5
    for x in (-lane, lane):
        z = plan.near + rng.uniform(3, 30)
        while z < 110:
            kind = str(rng.choice(["car", "truck", "bus"], p=(0.86, 0.08, 0.06)))
            if rng.random() < 0.25 + 0.6 * plan.density:
                put(draw_vehicle, x + rng.normal(0, 0.25), z, kind)
            z += rng.uniform(12, 40)
    if rng.random() < 0.15:
        put(draw_vehicle, rng.uniform(-plan.road, plan.road), rng.uniform(12, 45), "car", True)
    for side in (-1, 1):
        if plan.road > 4.2 and rng.random() < 0.6:  # parked along the kerb
            for z in np.arange(plan.near + rng.uniform(2, 8), 90, rng.uniform(5.5, 9)):
                if rng.random() < 0.3 + 0.5 * plan.density:
                    put(draw_vehicle, side * (plan.road - 1.0), float(z), "car")


def _put_people(put: _Put, rng: np.random.Generator, plan: _Plan) -> None:
    for _ in range(rng.poisson(2 + 9 * plan.density)):
        z = plan.near + 2 + rng.gamma(2, 10)
        x = rng.choice([-1, 1]) * rng.uniform(plan.road + 0.3, plan.front - 0.3)
        if rng.random() < 0.12:
            x = rng.uniform(-plan.road, plan.road)
        put(draw_person, x, z)
    for _ in range(rng.poisson(1.2 * plan.density + 0.3)):
        ridden = bool(rng.random() < 0.65)
        x = rng.uniform(-plan.road, plan.road) if ridden else rng.choice([-1, 1]) * (plan.road + 0.8)
        put(draw_cyclist, x, plan.near + 3 + rng.gamma(2, 8), ridden)


def _put_furniture(put: _Put, rng: np.random.Generator, plan: _Plan) -> None:
    for side in (-1, 1):
        for z in np.arange(plan.near + rng.uniform(1, 12), 100, rng.uniform(9, 26)):
            kind = str(rng.choice(["plain", "lamp", "sign", "light"], p=(0.25, 0.3, 0.3, 0.15)))
            put(draw_pole, side * (plan.road + rng.uniform(0.3, 0.8)), z + rng.uniform(-2, 2), kind)
        if rng.random() < 0.45:
            for z in np.arange(plan.near + rng.uniform(4, 14), 110, rng.uniform(7, 16)):
                put(draw_tree, side * (plan.road + rng.uniform(0.9, 1.6)), float(z), plan.foliage)
        for z in rng.uniform(plan.near + 3, 50, rng.poisson(0.8)):
            put(draw_bin, side * (plan.front - 0.5), float(z))


def _paint_bonnet(canvas: Canvas, rng: np.random.Generator) -> None:
    """The camera car's own bonnet at the lower border."""
    rows, columns = canvas.label.shape
    middle = (int(columns * rng.uniform(0.45, 0.55)), rows)
    axes = (int(columns * rng.uniform(0.45, 0.6)), int(rows * rng.uniform(0.05, 0.1)))
    colour = tuple(float(value) for value in rng.uniform(25, 150) + rng.normal(0, 5, 3))
    cv2.ellipse(canvas.image, middle, axes, 0, 0, 360, colour, cv2.FILLED)
    cv2.ellipse(canvas.label, middle, axes, 0, 0, 360, LABEL_IDS["ego vehicle"], cv2.FILLED)
