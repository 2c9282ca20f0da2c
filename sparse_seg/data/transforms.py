"""From uint8 frames to the network's input: augmentation for training, normalisation for both."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_seg.config import DataConfig
from sparse_seg.data.dataset import IGNORE_INDEX, Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LUMA = np.array([0.299, 0.587, 0.114])  # BT.601
_HUE_SHARE = 0.1  # radians of hue turn per unit of jitter: lanes and signs keep their colour's name


def normalise(
    image: Image, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """`(image / 255 - mean) / std`: uint8 RGB `[H, W, 3]` to a contiguous float32 tensor `[3, H, W]`.

    Raises:
        ValueError: the image is not uint8: values of 0..1 would all become nearly black.
    """
    require_bytes(image)
    return _normalise(image.astype(np.float32), mean, std)


def require_bytes(image: Image) -> None:
    """Raises a ValueError where an image is not uint8."""
    if image.dtype != np.uint8:
        raise ValueError(f"an image of {image.dtype}: expected uint8, 0..255")


def _normalise(image: NDArray[np.float32], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    scale = (1 / (255 * np.asarray(std))).astype(np.float32)
    shift = (np.asarray(mean) / np.asarray(std)).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray((image * scale - shift).transpose(2, 0, 1)))


class Draw(NamedTuple):
    """Random parameters of one sample's augmentation."""

    warp: NDArray[np.float64]  # [2, 3], from a crop's pixel (x, y) to the place in the image that it shows
    exponent: float  # that values 0..1 are raised to; 1 keeps them
    colour: NDArray[np.float64]  # [3, 3], which RGB is multiplied with
    luma_share: float  # of the crop's mean luma, which is added


class TrainTransform:
    """Random scale, crop, flip, light and colour jitter, as a config's keys for data say.

    Scale, crop and flip are one affine warp of the crop's pixels alone, so the cost does not grow with the
    image. Where the scaled image is smaller than the crop, the rest has the mean colour and label 255.
    """

    def __init__(self, data: DataConfig) -> None:
        self.data = data

    def __call__(self, image: Image, label: Image, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Image `[H, W, 3]` uint8 and label `[H, W]` uint8 to float32 `[3, h, w]` and int64 `[h, w]`."""
        require_bytes(image)
        data, draw = self.data, self.draw(image.shape[0], image.shape[1], rng)
        fill = [255 * channel for channel in data.mean]
        crop = _warp(image, draw.warp, data.crop, cv2.INTER_LINEAR, fill)
        if data.gamma:
            crop = _relight(crop, draw.exponent)
        pixels = crop.astype(np.float32)
        if data.jitter or data.tint:
            pixels = _jitter(pixels, draw.colour, draw.luma_share)
        target = _warp(label, draw.warp, data.crop, cv2.INTER_NEAREST, [IGNORE_INDEX])
        return _normalise(pixels, data.mean, data.std), torch.from_numpy(target.astype(np.int64))

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Draw:
        """The random part, for an image of `height` x `width` px."""
        data, warp = self.data, self._draw_warp(height, width, rng)
        exponent, colour, share = 1.0, np.eye(3), 0.0
        if data.gamma:
            exponent = float(np.exp(rng.uniform(-data.gamma, data.gamma)))
        if data.jitter:
            colour, share = _draw_colour(data.jitter, rng)
        if data.tint:
            colour = colour * rng.uniform(1 - data.tint, 1 + data.tint, 3)
        return Draw(warp, exponent, colour, share)

    def _draw_warp(self, height: int, width: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """The matrix `[2, 3]` from a crop's pixel (x, y) to the place in the image that it shows."""
        crop_height, crop_width = self.data.crop
        scale = np.exp(rng.uniform(*np.log(self.data.scale_range)))
        top = _draw_offset(round(height * scale) - crop_height, rng)
        left = _draw_offset(round(width * scale) - crop_width, rng)
        half = 0.5 / scale - 0.5  # pixel centres: (q + 0.5) / scale - 0.5
        warp = np.array([[1 / scale, 0, left / scale + half], [0, 1 / scale, top / scale + half]])
        if self.data.flip and rng.random() < 0.5:
            warp = warp @ np.array([[-1, 0, crop_width - 1], [0, 1, 0], [0, 0, 1]])
        return warp


def _draw_offset(excess: int, rng: np.random.Generator) -> int:
    """Where the crop starts in the scaled image, px; negative where the image is the smaller one."""
    return int(rng.integers(min(excess, 0), max(excess, 0), endpoint=True))


def _warp(
    image: Image, warp: NDArray[np.float64], crop: Sequence[int], interpolation: int, fill: list[float]
) -> Image:
    flags = interpolation | cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(
        image, warp, (crop[1], crop[0]), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=fill
    )
    return np.asarray(warped, np.uint8)


def _relight(image: Image, exponent: float) -> Image:
    """Values 0..1 to the power of the exponent: below 1 shadows brighten, white and black stay."""
    table = np.rint(255 * (np.arange(256) / 255) ** exponent).astype(np.uint8)
    return table[image]


def _draw_colour(amount: float, rng: np.random.Generator) -> tuple[NDArray[np.float64], float]:
    """Brightness, contrast, saturation and a little hue, composed to `Draw`'s colour and luma_share."""
    brightness, contrast, saturation = rng.uniform(1 - amount, 1 + amount, 3)
    angle = rng.uniform(-1, 1) * _HUE_SHARE * amount * np.pi
    grey = np.tile(LUMA, (3, 1))
    chroma = saturation * (np.eye(3) - grey)
    return brightness * contrast * (grey + _hue_turn(angle) @ chroma), float(brightness * (1 - contrast))


def _jitter(
    image: NDArray[np.float32], colour: NDArray[np.float64], luma_share: float
) -> NDArray[np.float32]:
    """The image in other colours, clipped to 0..255."""
    added = luma_share * float(image.mean(axis=(0, 1)) @ LUMA)
    affine = np.column_stack([colour, np.full(3, added)])
    return np.clip(cv2.transform(image, affine), 0, 255)


def _hue_turn(angle: float) -> NDArray[np.float64]:
    """Rotation by `angle` radians around the grey axis of RGB (Rodrigues' formula)."""
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
