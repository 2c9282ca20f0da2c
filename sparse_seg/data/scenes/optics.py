"""What the surface and the camera add to flat paint: texture, light, colour, blur, noise."""

import cv2
import numpy as np
from numpy.typing import NDArray

from sparse_seg.data.dataset import Image
from sparse_seg.data.scenes.canvas import LABEL_IDS

_GRAIN = {"road": 0.06, "sidewalk": 0.07, "wall": 0.08, "vegetation": 0.16, "terrain": 0.14, "sky": 0.012}
_PLAIN = 0.05  # contrast of the texture of all other labels


def smooth_noise(rng: np.random.Generator, size: tuple[int, int], cells: int) -> NDArray[np.float32]:
    """Normal noise `[H, W]` float32 with `cells` independent values per image height, interpolated."""
    columns = max(2, round(cells * size[1] / size[0]))
    grid = rng.standard_normal((max(2, cells), columns), np.float32)
    return np.asarray(cv2.resize(grid, (size[1], size[0]), interpolation=cv2.INTER_CUBIC), np.float32)


def photograph(image: Image, label: Image, rng: np.random.Generator) -> Image:
    """The camera's picture `[H, W, 3]` uint8 RGB of painted surfaces with label ids `[H, W]`."""
    rows, columns = label.shape
    strength = np.full(256, _PLAIN, np.float32)
    for name, grain in _GRAIN.items():
        strength[LABEL_IDS[name]] = grain
    strength *= rng.uniform(0.5, 1.4, 256).astype(np.float32)
    gain = rng.standard_normal(label.shape, np.float32)
    gain += sum(smooth_noise(rng, label.shape, rows // width) for width in (4, 14))
    gain = np.maximum(1 + np.asarray(cv2.LUT(label, strength)) * gain, 0.1)
    gain *= 1 + 0.10 * smooth_noise(rng, label.shape, 3)
    y, x = (np.linspace(-1, 1, length, dtype=np.float32) ** 2 for length in (rows, columns))
    gain *= 1 - rng.uniform(0, 0.15) * (y[:, None] + x)  # a lens is darker at the rim
    tint = rng.uniform(0.75, 1.2) * (1 + rng.normal(0, 0.05) * np.array((1, 0, -1)))
    light = image.astype(np.float32) * gain[..., None] * tint.astype(np.float32)
    light = np.asarray(cv2.GaussianBlur(light, (0, 0), rng.uniform(0.3, 0.75) * max(rows / 256, 0.5)))
    light += rng.uniform(1, 5) * rng.standard_normal((rows, columns, 1), np.float32)
    value = np.linspace(0, 1, 256) ** rng.uniform(0.8, 1.25)
    table = np.rint(255 * (0.5 + (value - 0.5) * rng.uniform(0.85, 1.2)))
    return table.clip(0, 255).astype(np.uint8)[light.clip(0, 255).astype(np.uint8)]
