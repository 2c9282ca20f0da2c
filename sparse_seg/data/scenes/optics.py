"""What the surface and the camera add to flat paint: texture, light, colour, blur, noise."""

import cv2
import numpy as np
from numpy.typing import NDArray

from sparse_seg.data.dataset import Image
from sparse_seg.data.scenes.canvas import LABEL_IDS

# Texture contrast by label: fine (about 1 px), middle and coarse grain. Others get _PLAIN.
_GRAIN = {
    "road": (0.06, 0.03, 0.07),
    "sidewalk": (0.06, 0.06, 0.08),
    "building": (0.05, 0.05, 0.06),
    "wall": (0.07, 0.08, 0.08),
    "vegetation": (0.16, 0.20, 0.12),
    "terrain": (0.14, 0.14, 0.14),
    "sky": (0.01, 0.01, 0.02),
}
_PLAIN = (0.04, 0.04, 0.05)


def smooth_noise(rng: np.random.Generator, size: tuple[int, int], cells: int) -> NDArray[np.float32]:
    """Normal noise `[H, W]` float32 with `cells` independent values per image height, interpolated."""
    columns = max(2, round(cells * size[1] / size[0]))
    grid = rng.standard_normal((max(2, cells), columns), np.float32)
    smooth = cv2.resize(grid, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
    return np.asarray(smooth, np.float32)


def photograph(image: Image, label: Image, rng: np.random.Generator) -> Image:
    """The camera's picture `[H, W, 3]` uint8 RGB of painted surfaces with label ids `[H, W]`."""
    rows = label.shape[0]
    gain = _texture(label, rng)
    gain *= 1 + 0.10 * smooth_noise(rng, label.shape, 3)
    gain *= _vignette(label.shape, rng.uniform(0, 0.3))
    warmth = rng.normal(0, 0.05)
    tint = rng.uniform(0.75, 1.2) * np.array((1 + warmth, 1 + rng.normal(0, 0.015), 1 - warmth))
    light = image.astype(np.float32) * gain[..., None] * tint.astype(np.float32)
    blur = rng.uniform(0.3, 0.75) * max(rows / 256, 0.5)
    light = np.asarray(cv2.GaussianBlur(light, (0, 0), blur), np.float32)
    light += rng.uniform(1, 5) * rng.standard_normal((*label.shape, 1), np.float32)
    return np.asarray(cv2.LUT(np.clip(light, 0, 255).astype(np.uint8), _tone_curve(rng)), np.uint8)


def _texture(label: Image, rng: np.random.Generator) -> NDArray[np.float32]:
    """Brightness factor `[H, W]`: three octaves of noise, each as strong as the label's material asks."""
    strength = np.tile(np.array(_PLAIN, np.float32), (256, 1))
    for name, grain in _GRAIN.items():
        strength[LABEL_IDS[name]] = grain
    strength *= rng.uniform(0.5, 1.4, (256, 3)).astype(np.float32)
    rows = label.shape[0]
    octaves = (
        rng.standard_normal(label.shape, np.float32),
        *(smooth_noise(rng, label.shape, rows // n) for n in (4, 14)),
    )
    gain = np.ones(label.shape, np.float32)
    for octave, noise in enumerate(octaves):
        gain += cv2.LUT(label, strength[:, octave]) * noise
    return np.maximum(gain, 0.1)


def _vignette(size: tuple[int, int], depth: float) -> NDArray[np.float32]:
    y, x = (np.linspace(-1, 1, length, dtype=np.float32) ** 2 for length in size)
    return 1 - depth * 0.5 * (y[:, None] + x)


def _tone_curve(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Gamma and contrast as a table `[256]`."""
    value = np.linspace(0, 1, 256) ** rng.uniform(0.8, 1.25)
    value = 0.5 + (value - 0.5) * rng.uniform(0.85, 1.2)
    return np.clip(np.rint(value * 255), 0, 255).astype(np.uint8)
