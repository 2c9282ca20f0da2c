"""Predictions as pictures on disk."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_seg.config import DataConfig
from sparse_seg.data.dataset import Image, read_image
from sparse_seg.data.listing import list_files
from sparse_seg.data.transforms import normalise
from sparse_seg.errors import DataError
from sparse_seg.lab.report.overlays import (
    Palette,
    colourise,
    contact_sheet,
    draw_blocks,
    draw_levels,
    overlay,
    write_image,
)
from sparse_seg.models.refinement import refine
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.models.way import Way

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}


RULE = f"images of the folder itself, with names in {', '.join(sorted(IMAGE_SUFFIXES))}"


def find_images(inputs: Sequence[str | Path]) -> list[Path]:
    """Image files among files and folders (searched one level deep, sorted); of other files, a warning is
    logged.

    Raises:
        DataError: a path does not exist, a folder holds no image, or two images would get the same name.
    """
    images: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = list_files(path, functools.partial(_is_image_in, path), RULE)
            if not found:
                raise DataError(f"{path}: no image in this folder")
            images += found
        elif path.exists():
            images.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    by_stem: dict[str, Path] = {}
    for image in images:
        other = by_stem.setdefault(image.stem, image)
        if other != image:
            raise DataError(f"{image} and {other} would write to the same pictures; predict them one by one")
    return list(by_stem.values())


def _is_image_in(folder: Path, file: Path) -> bool:
    return file.parent == folder and file.suffix.lower() in IMAGE_SUFFIXES


@torch.inference_mode()
def write_pictures(
    model: SelectiveSegmentor,
    path: Path,
    out: str | Path,
    palette: Palette,
    data: DataConfig,
    output_stride: int | None = None,
    show_levels: bool = False,
    steps: Sequence[float] | None = None,
) -> None:
    """Segment one image; write `NAME_overlay.png`, `NAME_classes.png` and, if selective, `NAME_blocks.png`.

    Args:
        show_levels: also `NAME_levels.png`, every block in the colour of its stride.
        steps: also `NAME_steps.png`, refinement to these rising fine fractions step by step.

    Raises:
        DataError: the file is no image, or too small for the network.
    """
    image = read_image(path)
    batch = normalise(image, data.mean, data.std)[None].to(next(model.parameters()).device)
    try:
        run = model.start(batch).follow(Way(output_stride))
        classes = run.classes()
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    label = classes[0].cpu().numpy()
    write_image(Path(out) / f"{path.stem}_overlay.png", overlay(image, label, palette))
    write_image(Path(out) / f"{path.stem}_classes.png", colourise(label, palette))
    if run.mask is not None:
        levels = run.levels[0].cpu().numpy()
        blocks = draw_blocks(image, levels == len(model.strides) - 1, model.strides[-1])
        write_image(Path(out) / f"{path.stem}_blocks.png", blocks)
        if show_levels:
            write_image(Path(out) / f"{path.stem}_levels.png", draw_levels(image, levels, model.strides))
    if steps is not None:
        write_image(Path(out) / f"{path.stem}_steps.png", _steps(model, batch, image, palette, steps))


def _steps(
    model: SelectiveSegmentor, batch: Tensor, image: Image, palette: Palette, fractions: Sequence[float]
) -> Image:
    """A contact sheet: a column per step, prediction above blocks; what a step changed is white."""
    columns: list[tuple[tuple[str, Image], ...]] = []
    before = None
    for fraction, step in zip(fractions, refine(model, batch, fractions), strict=True):
        label = step.logits[0].max(0).indices.cpu().numpy()
        picture = overlay(image, label, palette)
        changed = np.zeros_like(label, bool) if before is None else label != before
        picture[changed], before = 255, label
        blocks = draw_levels(image, step.levels[0].cpu().numpy(), model.strides)
        title = f"f={fraction:g}" + (f": {100 * changed.mean():.1f}% changed (white)" if columns else "")
        columns.append(((title, picture), ("", blocks)))
    return contact_sheet([[column[row] for column in columns] for row in (0, 1)])
