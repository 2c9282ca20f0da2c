"""Where scenes are drawn: a camera over flat ground, and an image and its label painted together."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from sparse_seg.data.cityscapes import CITYSCAPES_IDS

Colour = NDArray[np.float64]
"""RGB, 0..255."""
Span = tuple[float, float]

LABEL_IDS = CITYSCAPES_IDS | {"ego vehicle": 1, "static": 4}

_FAR_OUTSIDE = 8000  # px; OpenCV's polygon filling overflows beyond some 2^15


@dataclass(frozen=True)
class View:
    """A pinhole camera along +z, and the light. World: x right, y up from the ground, z ahead, m."""

    focal: float  # px
    centre: float  # column that looks straight ahead
    horizon: float  # its row
    height: float  # of the camera above the ground, m
    bend: float  # curvature of the street, 1/m: what stands straight ahead at z is drawn at x + bend * z^2
    sun_side: int  # where the sun stands, -1 left, +1 right: surfaces that face it are lit
    contrast: float  # how much the others are darker, 0 under a closed sky
    haze: Colour
    haze_depth: float  # where 63 % of a colour is haze, m

    def project(self, points: NDArray[np.float64]) -> NDArray[np.int32]:
        """World points `[..., 3]` to pixels `[..., 2]` (column, row)."""
        x, y, z = np.moveaxis(points, -1, 0)
        z = np.maximum(z, 0.5)
        columns = self.centre + self.focal * (x / z + self.bend * z)
        rows = self.horizon + self.focal * (self.height - y) / z
        return np.stack([columns, rows], -1).clip(-_FAR_OUTSIDE, _FAR_OUTSIDE).round().astype(np.int32)

    def shade(self, facing: int) -> float:
        """Brightness of a surface: facing -1 left, +1 right, 0 the camera."""
        return 1 + self.contrast * (facing * self.sun_side - 0.3) * 0.7

    def in_haze(self, colours: ArrayLike, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Colours `[M, 3]` or one `[3]` as seen at depths `[M]`."""
        share = 1 - np.exp(-z / self.haze_depth)[:, None]
        return (np.asarray(colours) * (1 - share) + self.haze * share).clip(0, 255)


class Canvas:
    """An image `[H, W, 3]` uint8 RGB and its label ids `[H, W]` uint8, painted from back to front."""

    def __init__(self, size: tuple[int, int], view: View) -> None:
        self.image = np.zeros((*size, 3), np.uint8)
        self.label = np.full(size, LABEL_IDS["sky"], np.uint8)
        self.view = view

    def draw(
        self,
        polygons: ArrayLike,
        colours: ArrayLike,
        label: str | None = None,
        width: float = 0,
        solid: bool = False,
    ) -> None:
        """Fill polygons `[M, N, 3]` of world points, or one `[N, 3]`, one over the other, in one colour or
        one each `[M, 3]`; without a label only the image changes.

        Args:
            width: draw lines through the points instead, so many metres wide but at least one pixel.
            solid: the points are a convex solid's corners, in any order.
        """
        world = np.asarray(polygons, float).reshape(-1, *np.shape(polygons)[-2:])
        depths = world[..., 2].mean(1)
        seen = self.view.in_haze(colours, depths).tolist()
        for points, depth, colour in zip(self.view.project(world), depths, seen, strict=True):
            painted = [(self.image, colour), *([(self.label, LABEL_IDS[label])] if label else [])]
            for picture, value in painted:
                if width:
                    thickness = max(1, round(width * self.view.focal / float(depth)))
                    cv2.polylines(picture, [points], False, value, thickness)
                elif solid:
                    cv2.fillConvexPoly(picture, cv2.convexHull(points), value)
                else:
                    cv2.fillPoly(picture, [points], value)

    def box(self, x: Span, y: Span, z: Span, colour: Colour, label: str) -> None:
        """An upright box, its side and its near end, as the light falls on them."""
        side = colour * self.view.shade(-1 if x[0] > 0 else 1)
        self.draw([(a, b, c) for a in x for b in y for c in z], side, label, solid=True)
        self.draw(rectangle(x, y, z[0]), colour * self.view.shade(0))

    def cast_shadow(self, polygons: NDArray[np.float64], strength: float) -> None:
        """Darken everything painted so far in polygons `[M, N, 3]`."""
        mask = np.zeros(self.label.shape, np.uint8)
        for outline in self.view.project(polygons):
            cv2.fillPoly(mask, [outline], 255)
        soft = cv2.GaussianBlur(mask, (0, 0), self.label.shape[0] / 200)
        self.image = (self.image * (1 - soft.astype(np.float32) * (strength / 255))[..., None]).astype(
            np.uint8
        )


def rectangle(x: Span | float, y: Span | float, z: Span | float) -> NDArray[np.float64]:
    """The corners `[4, 3]` of an upright or flat rectangle: two of x, y, z are spans, the third is one
    number."""
    ring = iter(((0, 1, 1, 0), (0, 0, 1, 1)))
    return np.stack([np.asarray(s)[list(next(ring))] if np.ndim(s) else np.full(4, s) for s in (x, y, z)], 1)


def copies(shape: NDArray[np.float64], places: ArrayLike) -> NDArray[np.float64]:
    """A shape `[N, 3]` at each place `[M, 3]`: `[M, N, 3]`."""
    return shape + np.reshape(places, (-1, 1, 3))


def band(left: ArrayLike, right: ArrayLike, depths: NDArray[np.float64]) -> NDArray[np.float64]:
    """The ground `[N - 1, 4, 3]` between x = left and right, in slices from each of N depths to the next."""
    near, far = (np.stack([np.broadcast_to(x, depths.shape), 0 * depths, depths], 1) for x in (left, right))
    return np.stack([near[:-1], far[:-1], far[1:], near[1:]], 1)
