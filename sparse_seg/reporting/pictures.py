"""Predictions as pictures on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparse_seg.data.dataset import read_image
from sparse_seg.data.transforms import normalise
from sparse_seg.errors import DataError
from sparse_seg.evaluation.evaluate import predict
from sparse_seg.models.segmentor import SelectiveSegmentor
from sparse_seg.reporting.overlays import Palette, colourise, draw_blocks, overlay, write_image
from sparse_seg.schema import DataConfig

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}


def find_images(inputs: Sequence[str | Path]) -> list[Path]:
    """Image files among files and folders (searched one level deep, sorted).

    Raises:
        DataError: a path does not exist, a folder holds no image, or two images would get the same name.
    """
    images: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
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


def write_pictures(
    model: SelectiveSegmentor,
    path: Path,
    out: str | Path,
    palette: Palette,
    data: DataConfig,
    output_stride: int | None = None,
) -> None:
    """Segment one image; write `NAME_overlay.png`, `NAME_classes.png` and, if selective, `NAME_blocks.png`.

    Raises:
        DataError: the file is no image, or too small for the network.
    """
    image = read_image(path)
    device = next(model.parameters()).device
    try:
        classes, fine_blocks = predict(
            model, normalise(image, data.mean, data.std)[None].to(device), output_stride
        )
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    label = classes[0].cpu().numpy()
    write_image(Path(out) / f"{path.stem}_overlay.png", overlay(image, label, palette))
    write_image(Path(out) / f"{path.stem}_classes.png", colourise(label, palette))
    if fine_blocks is not None:
        write_image(Path(out) / f"{path.stem}_blocks.png", draw_blocks(image, fine_blocks[0].cpu().numpy()))
