"""What stands and walks in the street: people, cyclists, bins, trees, poles with signs and lights."""

import numpy as np
from numpy.typing import NDArray

from sparse_seg.data.scenes.canvas import Canvas, Colour, box, disc, facing, strip, unit_disc

PAINTS = np.array(
    [
        (186, 188, 190), (40, 42, 46), (98, 102, 108), (232, 232, 228), (138, 26, 28), (30, 58, 112),
        (70, 84, 60), (150, 138, 112), (196, 156, 44),
    ],
    dtype=float,
)  # fmt: skip
_SKINS = np.array([(224, 184, 158), (186, 138, 108), (120, 82, 60), (84, 58, 46)], dtype=float)
TYRE = np.array((28.0, 28.0, 30.0))
_DISTANT = 45.0  # m; crowns beyond have fewer clumps
_LEAVES = 22  # corners of a clump


def draw_person(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A standing or walking person."""
    tall = rng.uniform(1.5, 1.92)
    stride, broad = rng.uniform(0.03, 0.3), rng.uniform(0.19, 0.27)
    coat, trousers = (rng.uniform(20, 190, 3) * rng.uniform(0.5, 1.1) for _ in range(2))
    skin = _SKINS[rng.integers(len(_SKINS))]
    hip, shoulder = 0.48 * tall, 0.83 * tall
    canvas.polygon(strip(x - 0.3, x + 0.3, np.array((z - 0.1, z + 0.4))), (50, 50, 52))
    for foot in (-stride, stride):
        leg = [(x - 0.1, hip, z), (x + 0.1, hip, z), (x + foot + 0.08, 0, z), (x + foot - 0.08, 0, z)]
        canvas.hull(leg, trousers, "person")
    arm = rng.uniform(0.0, 0.25)
    for out in (-1, 1):
        hand = (x + out * (broad + arm), hip)
        limb = [(x + out * broad, shoulder - 0.02, z), (x + out * (broad - 0.12), shoulder - 0.1, z)]
        canvas.hull([*limb, (*hand, z), (hand[0] - out * 0.1, hand[1], z)], coat * 0.85, "person")
    torso = [
        (x - broad, shoulder, z),
        (x + broad, shoulder, z),
        (x + 0.17, hip - 0.1, z),
        (x - 0.17, hip - 0.1, z),
    ]
    canvas.hull([*torso, (x, shoulder + 0.07, z)], coat, "person")
    head = (x + rng.uniform(-0.04, 0.04), 0.92 * tall, z)
    canvas.polygon(disc(head, 0.13), rng.uniform(20, 120, 3), "person")
    canvas.polygon(disc((head[0], head[1] - 0.04, z), 0.095), skin, "person")


def draw_cyclist(canvas: Canvas, rng: np.random.Generator, x: float, z: float, ridden: bool) -> None:
    """A bicycle seen from the side, with or without its rider."""
    colour = PAINTS[rng.integers(len(PAINTS))] * 0.8
    ahead = rng.choice([-1, 1])
    rear, front = x - ahead * 0.53, x + ahead * 0.53
    for wheel in (rear, front):
        canvas.line(disc((wheel, 0.34, z), 0.34, 16), 0.06, TYRE, "bicycle", closed=True)
    saddle, bars = (x - ahead * 0.2, 0.95, z), (front - ahead * 0.1, 1.02, z)
    crank = (x, 0.34, z)
    for path in (
        [(rear, 0.34, z), saddle, crank, (rear, 0.34, z)],
        [crank, bars, (front, 0.34, z)],
        [saddle, bars],
    ):
        canvas.line(path, 0.06, colour, "bicycle")
    if ridden:
        coat, trousers = rng.uniform(20, 200, 3), rng.uniform(20, 120, 3)
        shoulder = (x + ahead * 0.15, 1.5, z)
        canvas.line(
            [saddle, (x + ahead * 0.25, 0.75, z), (x + ahead * 0.05, 0.3, z)], 0.17, trousers, "rider"
        )
        canvas.line([shoulder, (x + ahead * 0.38, 1.25, z), bars], 0.11, coat * 0.85, "rider")
        canvas.line([(saddle[0], 1.0, z), shoulder], 0.33, coat, "rider")
        canvas.polygon(disc((shoulder[0] + ahead * 0.06, 1.76, z), 0.14), rng.uniform(30, 200, 3), "rider")


def draw_pole(canvas: Canvas, rng: np.random.Generator, x: float, z: float, kind: str) -> None:
    """A thin pole: `plain`, or carrying a `lamp`, a `sign` or a traffic `light`."""
    colour = np.full(3, rng.choice([62.0, 120.0, 158.0])) + rng.normal(0, 8, 3)
    inward = -np.sign(x)
    height = {"plain": rng.uniform(1.0, 5.0), "lamp": rng.uniform(6, 9), "sign": rng.uniform(2.4, 3.2)}.get(
        kind, rng.uniform(3.0, 3.8)
    )
    canvas.line([(x, 0, z), (x, height, z)], rng.uniform(0.08, 0.18), colour, "pole")
    if kind == "lamp":
        reach = rng.uniform(0.8, 2.2)
        canvas.line([(x, height, z), (x + inward * reach, height + 0.25, z)], 0.09, colour, "pole")
        head = facing((x + inward * reach - 0.3, x + inward * reach + 0.3), (height + 0.1, height + 0.3), z)
        canvas.polygon(head, (200, 200, 190), "pole")
    elif kind == "sign":
        _draw_sign(canvas, rng, x, height, z)
    elif kind == "light":
        _draw_traffic_light(canvas, rng, x, height, z)


def _draw_sign(canvas: Canvas, rng: np.random.Generator, x: float, height: float, z: float) -> None:
    radius = rng.uniform(0.3, 0.45)
    corners = int(rng.choice([3, 4, 8, 16]))
    rim, inner = [
        ((190, 28, 30), (236, 236, 230)),
        ((28, 70, 160), (40, 88, 180)),
        ((236, 236, 230), (214, 170, 32)),
        ((150, 150, 152), (128, 128, 130)),  # seen from behind
    ][rng.choice(4, p=(0.4, 0.25, 0.15, 0.2))]
    centre = (x, height - radius * 0.6, z)
    canvas.polygon(disc(centre, radius, corners), rim, "traffic sign")
    canvas.polygon(disc(centre, radius * 0.72, corners), inner)
    if rng.random() < 0.5:
        canvas.polygon(
            facing((x - radius * 0.4, x + radius * 0.4), (centre[1] - 0.06, centre[1] + 0.06), z),
            (30, 30, 32),
        )


def _draw_traffic_light(canvas: Canvas, rng: np.random.Generator, x: float, height: float, z: float) -> None:
    case = facing((x - 0.2, x + 0.2), (height - 1.0, height), z)
    canvas.polygon(case, (34, 36, 36), "traffic light")
    lit = rng.integers(3)
    for lamp, colour in enumerate([(230, 40, 30), (236, 170, 40), (60, 200, 110)]):
        shade = np.array(colour) * (1.0 if lamp == lit else 0.22)
        canvas.polygon(disc((x, height - 0.2 - 0.3 * lamp, z), 0.12, 10), shade)


def draw_tree(
    canvas: Canvas, rng: np.random.Generator, x: float, z: float, tone: Colour, scale: float = 1.0
) -> None:
    """A trunk and a crown of leaf clumps, all labelled vegetation; `scale` below 1 makes shrubs of it."""
    tall = rng.uniform(4.5, 9.0) * scale
    crown = tall * rng.uniform(0.24, 0.36)
    trunk = rng.uniform(0.12, 0.25) * scale
    bark = np.array((74.0, 60.0, 48.0)) * rng.uniform(0.7, 1.4)
    stem = [
        (x - trunk, 0, z),
        (x + trunk, 0, z),
        (x + trunk * 0.6, tall - crown, z),
        (x - trunk * 0.6, tall - crown, z),
    ]
    canvas.polygon(stem, bark, "vegetation")
    tone = tone * rng.uniform(0.8, 1.2)
    clumps = int(rng.integers(4, 8) if z > _DISTANT else rng.integers(7, 13))
    around = rng.uniform(0, 2 * np.pi, clumps)
    away = crown * rng.uniform(0.1, 0.75, clumps)
    middles = np.stack(
        [x + away * np.cos(around), tall - crown + away * np.sin(around), np.full(clumps, z)], 1
    )
    dark = tone * rng.uniform(0.55, 0.8, (clumps, 1))
    canvas.heap(_clumps(rng, middles, crown * rng.uniform(0.35, 0.65, clumps)), dark, "vegetation")
    lit = tone * rng.uniform(0.9, 1.0 + 0.6 * canvas.light.contrast, (clumps, 1))
    middles += crown * np.array((0.15 * canvas.light.sun_side, 0.15, 0))
    canvas.heap(_clumps(rng, middles, crown * rng.uniform(0.2, 0.35, clumps)), lit, "vegetation")


def _clumps(
    rng: np.random.Generator, middles: NDArray[np.float64], radii: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Discs `[M, corners, 3]` with ragged outlines around `[M, 3]`."""
    ragged = radii[:, None, None] * rng.uniform(0.72, 1.15, (len(radii), _LEAVES, 1))
    return unit_disc(_LEAVES) * ragged + middles[:, None]


def draw_bin(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A litter bin or a box, labelled `static`, which is not evaluated."""
    wide, tall, deep = rng.uniform(0.4, 1.2), rng.uniform(0.7, 1.4), rng.uniform(0.4, 1.0)
    colour = rng.uniform(30, 150, 3)
    span = (x - wide / 2, x + wide / 2)
    canvas.hull(
        box(span, (0, tall), (z, z + deep)), colour * canvas.light.shade(-1 if x > 0 else 1), "static"
    )
    canvas.polygon(facing(span, (0, tall), z), colour)
