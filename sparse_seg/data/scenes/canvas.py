"""Where scenes are drawn: a camera over flat ground, and an image and its label painted together."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparse_seg.data.cityscapes import CITYSCAPES_IDS

Colour = NDArray[np.float64]
"""RGB, 0..255."""

LABEL_IDS = CITYSCAPES_IDS | {"ego vehicle": 1, "static": 4}

_FAR_OUTSIDE = 8000  # px; OpenCV's polygon filling overflows beyond some 2^15


@dataclass(frozen=True)
class Camera:
    """A pinhole camera that looks along +z. World: x right, y up from the ground, z ahead, in metres."""

    focal: float
    """px"""
    centre: float
    """Column that looks straight ahead, px."""
    horizon: float
    """Row of the horizon, px."""
    height: float
    """Of the camera above the ground, m."""
    bend: float
    """Curvature of the street: what stands straight ahead at z is drawn at x + bend * z^2, 1/m."""

    def project(self, points: ArrayLike) -> NDArray[np.float64]:
        """World points `[..., 3]` to pixels `[..., 2]` (column, row)."""
        world = np.asarray(points, dtype=float)
        z = np.maximum(world[..., 2], 0.5)
        pixels = np.empty((*z.shape, 2))
        pixels[..., 0] = self.centre + self.focal * (world[..., 0] / z + self.bend * z)
        pixels[..., 1] = self.horizon + self.focal * (self.height - world[..., 1]) / z
        return pixels

    def scale(self, z: float) -> float:
        """Pixels per metre at depth z."""
        return self.focal / z

    def nearest(self, rows: int) -> float:
        """Depth of the ground at the lower border of an image of that many rows, m."""
        return self.focal * self.height / (rows - self.horizon)


@dataclass(frozen=True)
class Light:
    """What the time of day and the weather do to every colour."""

    sun_side: int
    """-1: the sun stands on the left and lights what faces left; +1: on the right."""
    contrast: float
    """0 under a closed sky, to about 0.45: how much sides away from the sun are darker."""
    haze: Colour
    haze_depth: float
    """Depth where 63 % of a colour is haze, m."""

    def shade(self, facing: int) -> float:
        """Brightness of a surface: facing -1 left, +1 right, 0 the camera."""
        return 1 + self.contrast * (facing * self.sun_side - 0.3) * 0.7


class Canvas:
    """An image `[H, W, 3]` uint8 RGB and its label ids `[H, W]` uint8, painted from back to front."""

    def __init__(self, size: tuple[int, int], camera: Camera, light: Light) -> None:
        self.image = np.zeros((*size, 3), np.uint8)
        self.label = np.full(size, LABEL_IDS["sky"], np.uint8)
        self.camera = camera
        self.light = light

    def polygon(self, points: ArrayLike, colour: ArrayLike, label: str | None = None) -> None:
        """Fills one polygon of world points `[N, 3]`; without a label only the image changes."""
        self.polygons(np.asarray(points, dtype=float)[None], colour, label)

    def polygons(self, points: NDArray[np.float64], colour: ArrayLike, label: str | None = None) -> None:
        """Fills polygons `[M, N, 3]` that do not overlap, all in one colour."""
        if points.size == 0:
            return
        outlines = list(_to_pixels(self.camera.project(points)))
        cv2.fillPoly(self.image, outlines, self._in_haze(colour, float(points[..., 2].mean())))
        if label is not None:
            cv2.fillPoly(self.label, outlines, LABEL_IDS[label])

    def heap(
        self, points: NDArray[np.float64], colours: NDArray[np.float64], label: str | None = None
    ) -> None:
        """Fills polygons `[M, N, 3]` at one depth one over the other, each in its colour `[M, 3]`."""
        hazed = self._in_haze(colours, float(points[0, 0, 2]))
        for outline, colour in zip(_to_pixels(self.camera.project(points)), hazed, strict=True):
            cv2.fillPoly(self.image, [outline], colour)
            if label is not None:
                cv2.fillPoly(self.label, [outline], LABEL_IDS[label])

    def hull(self, points: ArrayLike, colour: ArrayLike, label: str | None = None) -> None:
        """Fills the convex outline of world points `[N, 3]`: a convex solid's silhouette."""
        world = np.asarray(points, dtype=float)
        outline = cv2.convexHull(_to_pixels(self.camera.project(world)))
        cv2.fillConvexPoly(self.image, outline, self._in_haze(colour, float(world[:, 2].mean())))
        if label is not None:
            cv2.fillConvexPoly(self.label, outline, LABEL_IDS[label])

    def line(
        self,
        points: ArrayLike,
        width: float,
        colour: ArrayLike,
        label: str | None = None,
        closed: bool = False,
    ) -> None:
        """Draws a line through world points `[N, 3]`, `width` metres wide but at least one pixel."""
        world = np.asarray(points, dtype=float)
        z = float(world[:, 2].mean())
        thickness = max(1, round(width * self.camera.scale(z)))
        pixels = [_to_pixels(self.camera.project(world))]
        cv2.polylines(self.image, pixels, closed, self._in_haze(colour, z), thickness)
        if label is not None:
            cv2.polylines(self.label, pixels, closed, LABEL_IDS[label], thickness)

    def darken_ground(self, shadows: Sequence[NDArray[np.float64]], strength: float) -> None:
        """Casts shadows, each a polygon `[N, 3]` of world points, on everything painted so far."""
        mask = np.zeros(self.label.shape, np.uint8)
        for shadow in shadows:
            cv2.fillPoly(mask, [_to_pixels(self.camera.project(shadow))], 255)
        soft = cv2.GaussianBlur(mask, (0, 0), self.label.shape[0] / 200)
        gain = 1 - soft.astype(np.float32) * (strength / 255)
        self.image = (self.image * gain[..., None]).astype(np.uint8)

    def _in_haze(self, colour: ArrayLike, z: float) -> list[Any]:
        """The colour or colours `[..., 3]` as seen over the distance z, as OpenCV takes them."""
        share = 1 - math.exp(-z / self.light.haze_depth)
        mixed = np.asarray(colour, dtype=float) * (1 - share) + self.light.haze * share
        return mixed.clip(0, 255).tolist()


def box(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float]) -> NDArray[np.float64]:
    """The eight corners `[8, 3]` of an upright box."""
    return np.array([(a, b, c) for a in x for b in y for c in z])


def facing(x: tuple[float, float], y: tuple[float, float], z: float) -> NDArray[np.float64]:
    """A rectangle `[4, 3]` that faces the camera at depth z."""
    return np.array([(x[0], y[0], z), (x[1], y[0], z), (x[1], y[1], z), (x[0], y[1], z)])


def along(x: float, y: tuple[float, float], z: tuple[float, float]) -> NDArray[np.float64]:
    """A rectangle `[4, 3]` that stands along the street at x."""
    return np.array([(x, y[0], z[0]), (x, y[0], z[1]), (x, y[1], z[1]), (x, y[1], z[0])])


def strip(left: ArrayLike, right: ArrayLike, depths: NDArray[np.float64]) -> NDArray[np.float64]:
    """A polygon `[2 N, 3]` on the ground between x = left and x = right at depths `[N]`."""
    sides = [
        np.stack([np.broadcast_to(side, depths.shape), np.zeros_like(depths), depths], axis=1)
        for side in (np.asarray(left, dtype=float), np.asarray(right, dtype=float))
    ]
    return np.concatenate([sides[0], sides[1][::-1]])


def disc(centre: tuple[float, float, float], radius: float, corners: int = 12) -> NDArray[np.float64]:
    """A regular polygon `[corners, 3]` that faces the camera, one corner up."""
    return unit_disc(corners) * radius + centre


@functools.cache
def unit_disc(corners: int) -> NDArray[np.float64]:
    """The regular polygon `[corners, 3]` around the origin with corners 1 m away; do not write to it."""
    turn = 2 * np.pi * np.arange(corners) / corners
    return np.stack([np.sin(turn), np.cos(turn), np.zeros(corners)], axis=1)


def _to_pixels(points: NDArray[np.float64]) -> NDArray[np.int32]:
    return points.clip(-_FAR_OUTSIDE, _FAR_OUTSIDE).round().astype(np.int32)
