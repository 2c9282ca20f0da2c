"""Predictions as pictures on disk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import yaml

from sparse_seg.config import parse_yaml
from sparse_seg.data.dataset import Image
from sparse_seg.data.folder import CLASS_FILE
from sparse_seg.errors import ConfigError, DataError
from sparse_seg.files import atomic_write
from sparse_seg.lab.predict.segment import Segmentation, Segmenter
from sparse_seg.lab.report.overlays import (
    colourise,
    contact_sheet,
    draw_blocks,
    draw_legend,
    draw_levels,
    write_image,
)
from sparse_seg.run.card import Card


def write_pictures(found: Segmentation, out: Path, ids_only: bool = False) -> None:
    """Write `NAME_ids.png`; unless `ids_only` also `NAME_overlay.png`, `NAME_classes.png` and, if selective,
    `NAME_blocks.png`.

    Args:
        out: folder and `NAME`.
    """
    write_image(f"{out}_ids.png", found.ids())
    if ids_only:
        return
    write_image(f"{out}_overlay.png", found.overlay())
    write_image(f"{out}_classes.png", colourise(found.classes, found.colours))
    if found.fine_blocks is not None:
        write_image(f"{out}_blocks.png", draw_blocks(found.image, found.fine_blocks, found.block))


def write_levels(found: Segmentation, out: Path, strides: Sequence[int]) -> None:
    """Write `NAME_levels.png`, every block in the colour of its stride; nothing if dense."""
    if found.levels is not None:
        write_image(f"{out}_levels.png", draw_levels(found.image, found.levels, strides))


def write_steps(segmenter: Segmenter, image: Image, out: Path, fractions: Sequence[float]) -> None:
    """Write `NAME_steps.png`, refinement to these rising fine fractions: a column per step, prediction above
    blocks; what a step changed is white."""
    columns, before = list[tuple[tuple[str, Image], ...]](), None
    for fraction, step in zip(fractions, segmenter.refine(image, fractions), strict=True):
        found = segmenter.refined(image, step)
        picture = found.overlay()
        changed = np.zeros_like(found.classes, bool) if before is None else found.classes != before
        picture[changed], before = 255, found.classes
        assert found.levels is not None
        blocks = draw_levels(image, found.levels, segmenter.model.strides)
        title = f"f={fraction:g}" + (f": {100 * changed.mean():.1f}% changed (white)" if columns else "")
        columns.append(((title, picture), ("", blocks)))
    write_image(f"{out}_steps.png", contact_sheet([[column[row] for column in columns] for row in (0, 1)]))


def write_legend(card: Card, out: str | Path, ids_only: bool = False) -> None:
    """Write `classes.yaml`, which says what the values in `NAME_ids.png` mean, in the form that
    `read_class_file` reads, unless it is there; unless `ids_only` also `legend.png`.

    Raises:
        DataError: a `classes.yaml` of other classes is there.
    """
    check_legend(card, out)
    file = Path(out, CLASS_FILE)
    if not file.exists():
        atomic_write(file, _class_text(card))
    if not ids_only:
        write_image(Path(out, "legend.png"), draw_legend(card.names, card.ids, card.colours))


def check_legend(card: Card, out: str | Path) -> None:
    """Raises a DataError if `out` has a `classes.yaml` that says anything else: a data set's, perhaps, or of
    another network's pictures."""
    file = Path(out, CLASS_FILE)
    if not file.exists():
        return
    with suppress(OSError, ConfigError):
        found, own = file.read_bytes(), _class_text(card).encode()
        if found == own or parse_yaml(found, CLASS_FILE) == parse_yaml(own, CLASS_FILE):
            return
    raise DataError(f"{file} is there and says other classes than the network's; name another --out folder")


def _class_text(card: Card) -> str:
    colours = [list(colour) for colour in card.colours]
    content = {"names": list(card.names), "ids": list(card.ids), "colours": colours}
    return yaml.safe_dump(content, default_flow_style=None, sort_keys=False, allow_unicode=True, width=100)
