"""Pictures of labels and block masks: numpy and OpenCV only. Images are [H, W, 3] uint8 RGB throughout."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from sparse_seg.data.dataset import IGNORE_INDEX, Image
from sparse_seg.files import atomic_write

Palette = Sequence[tuple[int, int, int]]

COARSE_BRIGHTNESS = 0.35
LEVEL_TINTS = ((30, 60, 160), (0, 150, 140), (255, 140, 0))  # of strides, coarsest first; two: first and last
TINT, LEGEND_HEIGHT = 0.45, 22  # opacity; px
OUTLINE = (255, 210, 0)
GAP = 8  # px between pictures


def colourise(label: np.ndarray, palette: Palette) -> Image:
    """Colours [H, W, 3] of a label map [H, W] of train ids; ignored pixels are black."""
    colours = np.array([*palette, (0, 0, 0)], np.uint8)
    return colours[np.where(label == IGNORE_INDEX, len(palette), label)]


def overlay(image: Image, label: np.ndarray, palette: Palette, alpha: float = 0.5) -> Image:
    """`image` with the colours of a label [H, W] over it at opacity `alpha`; ignored pixels stay as they
    are."""
    mixed = cv2.addWeighted(image, 1 - alpha, colourise(label, palette), alpha, 0)
    return np.where((label == IGNORE_INDEX)[..., None], image, mixed)


def draw_blocks(image: Image, fine_blocks: npt.NDArray[np.bool_], block: int = 16) -> Image:
    """`image` with its coarse blocks darkened and an outline around the fine region.

    fine_blocks: [ceil(H/block), ceil(W/block)] bool; blocks at the border may hold fewer pixels.
    """
    fine = _by_pixel(fine_blocks.astype(bool), block, image)
    picture = np.where(fine[..., None], image, (image * COARSE_BRIGHTNESS).astype(np.uint8))
    thickness = max(1, round(min(image.shape[:2]) / 500))
    inside = cv2.erode(fine.astype(np.uint8), np.ones((2 * thickness + 1, 2 * thickness + 1), np.uint8))
    picture[fine & (inside == 0)] = OUTLINE
    return picture


def draw_levels(image: Image, levels: npt.NDArray[np.int64], strides: Sequence[int]) -> Image:
    """`image` with every block in the colour of its stride, thin lines between blocks, and a legend below.

    levels: [ceil(H/s), ceil(W/s)] for the coarsest stride s; 0 is the coarsest. strides: px, finest first.
    Returns [H + legend, W, 3].
    """
    height, width = image.shape[:2]
    tints = np.array(LEVEL_TINTS if len(strides) == 3 else LEVEL_TINTS[::2], np.uint8)
    of_pixels = _by_pixel(levels, strides[-1], image)
    picture = cv2.addWeighted(image, 1 - TINT, tints[of_pixels], TINT, 0)
    for level, step in enumerate(strides[::-1]):  # the grid of sites, by stride
        grid = np.zeros((height, width), bool)
        grid[::step] = grid[:, ::step] = True
        grid &= of_pixels == level
        picture[grid] = picture[grid] // 4 * 3
    entries = [
        _legend_entry(f"stride {stride}: {100 * (levels == level).mean():.0f}%", tints[level])
        for level, stride in enumerate(strides[::-1])
    ]
    legend = np.full((LEGEND_HEIGHT, width, 3), 255, np.uint8)
    row = np.concatenate(entries, 1)[:, :width]
    legend[:, : row.shape[1]] = row
    return np.concatenate([picture, legend])


def _by_pixel(blocks: np.ndarray, block: int, image: Image) -> np.ndarray:
    """The value of each pixel's block, [H, W] of the image."""
    height, width = image.shape[:2]
    return blocks.repeat(block, axis=0).repeat(block, axis=1)[:height, :width]


def shrink(image: Image, width: int) -> Image:
    """`image` at most `width` px wide."""
    height, own = image.shape[:2]
    if own <= width:
        return image
    size = width, max(1, round(height * width / own))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def draw_legend(names: Sequence[str], ids: Sequence[int], palette: Palette) -> Image:
    """Every class's colour, id and name, in three columns; letters that OpenCV lacks are question marks."""
    texts = [
        f"{value}  {name}".encode("ascii", "replace").decode() for value, name in zip(ids, names, strict=True)
    ]
    width = max(map(len, texts))
    entries = [
        _legend_entry(text, np.array(colour), width) for text, colour in zip(texts, palette, strict=True)
    ]
    rows = -(-len(entries) // 3)
    entries += [np.full_like(entries[0], 255)] * (-len(entries) % rows)
    return np.concatenate(
        [np.concatenate(entries[top : top + rows]) for top in range(0, len(entries), rows)], 1
    )


def _legend_entry(text: str, colour: np.ndarray, letters: int = 0) -> Image:
    swatch = np.full((LEGEND_HEIGHT, LEGEND_HEIGHT, 3), 255, np.uint8)
    swatch[4:-4, 4:-4] = colour
    return np.concatenate([swatch, _title(text, LEGEND_HEIGHT, 7 * max(len(text), letters) + 8)], 1)


def contact_sheet(rows: Sequence[Sequence[tuple[str, Image]]]) -> Image:
    """Rows of named pictures under each other, white where a row is shorter."""
    strips = [side_by_side(row) for row in rows]
    width = max(strip.shape[1] for strip in strips)
    padding = [((0, 0), (0, width - strip.shape[1]), (0, 0)) for strip in strips]
    return np.concatenate([np.pad(*pair, constant_values=255) for pair in zip(strips, padding, strict=True)])


def side_by_side(row: Sequence[tuple[str, Image]]) -> Image:
    """Pictures in a row on white, tops aligned, each under its title (ASCII, shrunk to the picture's width).

    Returns [H + title height, sum of widths + gaps, 3].
    """
    height = max(picture.shape[0] for _, picture in row)
    title_height = max(20, round(height / 16))
    width = sum(picture.shape[1] for _, picture in row) + GAP * (len(row) - 1)
    canvas = np.full((title_height + height, width, 3), 255, np.uint8)
    left = 0
    for title, picture in row:
        right = left + picture.shape[1]
        canvas[:title_height, left:right] = _title(title, title_height, right - left)
        canvas[title_height : title_height + picture.shape[0], left:right] = picture
        left = right + GAP
    return canvas


def encode_image(image: np.ndarray, extension: str) -> bytes:
    """The file content of `image` ([H, W, 3] RGB or [H, W], uint8) as the format of `extension` (".png").

    Raises OSError for a format that OpenCV cannot write.
    """
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    try:
        done, content = cv2.imencode(extension, pixels)
    except cv2.error:
        done = False
    if not done:
        raise OSError(f"cannot encode an image as '{extension}'; use .png or .jpg")
    return content.tobytes()


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write `image` ([H, W, 3] RGB or [H, W], uint8) to `path` in the format of its extension, atomically.

    Raises OSError, naming the file, if it cannot be encoded or written.
    """
    try:
        atomic_write(path, encode_image(image, Path(path).suffix))
    except OSError as error:
        raise OSError(f"cannot write image {path}: {error}") from error


def _title(text: str, height: int, width: int) -> Image:
    """`text` as dark letters on white, [height, width, 3], as large as fits."""
    font = cv2.FONT_HERSHEY_SIMPLEX
    (unit_width, unit_height), _ = cv2.getTextSize(text, font, 1.0, 1)
    scale = min(0.5 * height / max(unit_height, 1), (width - 4) / max(unit_width, 1))
    picture = np.full((height, width, 3), 255, np.uint8)
    if scale > 0:
        origin = (2, round(height * 0.7))
        cv2.putText(picture, text, origin, font, scale, (30, 30, 30), max(1, round(height / 24)), cv2.LINE_AA)
    return picture
