"""Frames for a report: those on which two networks differ most, run at every step of a slider."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparse_seg.config import DataConfig
from sparse_seg.data.dataset import IGNORE_INDEX, Image, SegmentationDataset
from sparse_seg.data.transforms import normalise
from sparse_seg.evaluation.views import predict
from sparse_seg.lab.benchmark.runtimes import lift
from sparse_seg.lab.report.html import Explorer, Frame, Picture, Shot, photo
from sparse_seg.lab.report.overlays import colourise, draw_levels, overlay, shrink
from sparse_seg.progress import bar
from sparse_seg.run.network import SelectiveNetwork
from sparse_seg.run.way import Way

SHOWN = 4  # frames
WIDTH = 720  # px of a picture, at most
_Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """A network, run one way; `row` has its `miou`, `gmacs` and `milliseconds`, over the dataset."""

    name: str
    row: _Row
    model: SelectiveNetwork
    way: Way
    data: DataConfig

    def classes(self, image: Image, label: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Classes `[H, W]` of a frame, and the level of every block unless dense."""
        device = self.model.device
        batch = normalise(image, self.data.mean, self.data.std)[None].to(device)
        target = torch.from_numpy(label.astype(np.int64))[None].to(device)
        found = predict(self.model, batch, target, self.way)
        levels = None if found.levels is None else found.levels[0].cpu().numpy()
        return found.classes[0].cpu().numpy().astype(np.uint8), levels


def explore(
    cases: Sequence[Contender],
    chosen: int,
    dataset: SegmentationDataset,
    limit: int | None,
    text: str = "",
) -> Explorer:
    """Cases from the dense coarse network to the dense fine one, on the frames that show most.

    Args:
        chosen: the case that is compared with the last one, to choose frames, and that is shown first.
        limit: choose among the first so many frames; None: among all.
    """
    fine = cases[-1]
    frames = most_different((fine, cases[chosen]), dataset, min(len(dataset), limit or len(dataset)))
    text += (
        f" The frames are those on which {fine.name} and {cases[chosen].name} disagree about most labelled "
        "pixels, no two near each other. In the pictures of differences, pixels are white where the first "
        "alone is right, orange where the second alone is, grey where neither is. Left of the line is "
        f"{fine.name}."
    )
    # lift compares ways to run the same weights
    mixed = cases[0].row if cases[0].model is fine.model else None
    return Explorer(
        "What the fine fraction changes",
        text.strip(),
        [(case.name, numbers(case.row, mixed, fine.row)) for case in cases],
        [_frame(cases, chosen, dataset, index, share) for share, index in frames],
        chosen,
    )


def numbers(row: _Row, coarse: _Row | None, fine: _Row) -> str:
    """Accuracy and cost of a row, and its lift over a mixture of two dense ones."""
    text = f"mIoU {row['miou']:.2f} %, {row['gmacs']:.2f} GMACs"
    if row["milliseconds"] is None:
        return text
    text += f", {row['milliseconds']:.1f} ms"
    if coarse is None or row in (coarse, fine):
        return text
    mious, times = ([one[key] for one in (row, coarse, fine)] for key in ("miou", "milliseconds"))
    if mious[1] == mious[2] or times[1] == times[2]:
        return text
    return f"{text}, lift {lift((mious[0], mious[1], mious[2]), (times[0], times[1], times[2])):+.2f}"


def most_different(
    pair: tuple[Contender, Contender], dataset: SegmentationDataset, count: int
) -> list[tuple[float, int]]:
    """(share of labelled pixels on which two cases differ, frame), most first, without neighbours."""
    found = []
    for index in bar(range(count), "differences", count):
        image, label = dataset.load(index)
        labelled = label != IGNORE_INDEX
        one, other = (case.classes(image, label)[0] for case in pair)
        found.append((float((one != other)[labelled].mean()) if labelled.any() else 0.0, index))
    chosen: list[tuple[float, int]] = []
    reach = count // (3 * SHOWN)
    for share, index in sorted(found, key=lambda entry: -entry[0]):
        if len(chosen) < SHOWN and all(abs(other - index) > reach for _, other in chosen):
            chosen.append((share, index))
    return chosen


def _frame(
    cases: Sequence[Contender], chosen: int, dataset: SegmentationDataset, index: int, share: float
) -> Frame:
    image, label = dataset.load(index)
    palette = dataset.classes.palette
    runs = [case.classes(image, label) for case in cases]
    shots = []
    for case, (classes, levels) in zip(cases, runs, strict=True):
        blocks = None
        if levels is not None:
            blocks = _photo(draw_levels(image, levels, case.model.strides), f"stride by block: {case.name}")
        shots.append(Shot(_photo(overlay(image, classes, palette), case.name), blocks))
    still = {
        "input": image,
        "label": colourise(label, palette),
        "difference": _difference(image, label, runs[-1][0], runs[chosen][0]),
    }
    note = f"{100 * share:.1f} % of the labelled pixels differ"
    pictures = [_photo(picture, name) for name, picture in still.items()]
    return Frame(dataset.name(index), note, pictures, shots)


def _photo(image: Image, caption: str) -> Picture:
    return photo(shrink(image, WIDTH), caption)


def _difference(image: Image, label: np.ndarray, dense: np.ndarray, selective: np.ndarray) -> Image:
    """The image, darkened and blue, with the pixels on which both disagree in white, orange or grey."""
    picture = (image * np.array([0.25, 0.35, 0.6])).astype(np.uint8)
    differ = (dense != selective) & (label != IGNORE_INDEX)
    picture[differ] = 128
    picture[differ & (dense == label)] = 255
    picture[differ & (selective == label)] = (255, 140, 0)
    return picture
