"""A page to look at before training: labels over images, classes, odd frames, augmentation."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_seg.config import Config
from sparse_seg.data import IGNORE_INDEX, ClassList, SegmentationDataset, open_split
from sparse_seg.data.batches import training_batches
from sparse_seg.data.dataset import Image
from sparse_seg.errors import DataError
from sparse_seg.files import check_outputs
from sparse_seg.lab.report.html import Picture, Section, photo, write_report
from sparse_seg.lab.report.overlays import draw_legend, overlay, shrink, side_by_side
from sparse_seg.lab.report.tables import Column, Table

SPLITS = ("train", "val")
MOST_IGNORED, MOST_ONE_CLASS = 0.5, 0.97  # share of pixels above which a frame is odd
FEW = 0.5  # of the classes that the middle frame has
RARE = 0.02  # share of frames below which a class is rare, and a frame that shows it odd
DARK, BRIGHT = 20, 235  # mean of all values
SHOWN_ODD, SHOWN_FAULTS = 12, 50
WIDTH = 480  # px of a picture
BAR = 24  # letters
SHOWN_SHARED = 5


@dataclass(frozen=True)
class _Frame:
    """What is known of an image and its label; pixels of each class, the last of none."""

    index: int
    size: tuple[int, int]
    brightness: float
    pixels: NDArray[np.int64]


@dataclass(frozen=True)
class _Split:
    name: str
    dataset: SegmentationDataset
    frames: list[_Frame]
    faults: list[str]


def write_page(config: Config, out: str | Path, count: int = 12) -> list[str]:
    """Write the page; returns what is wrong with files, one line each.

    Args:
        count: how many frames of each split to show, evenly spread.

    Raises:
        ConfigError, DataError: the dataset is missing.
        OverwriteError: the page would replace a file of it.
    """
    data = config.data
    datasets = {name: open_split(data, name) for name in SPLITS}
    check_outputs([out], (file for dataset in datasets.values() for file in dataset.files()))
    splits = [_read(name, dataset) for name, dataset in datasets.items()]
    classes = splits[0].dataset.classes
    faults = [fault for split in splits for fault in split.faults]
    sections = [_overview(splits), _histogram(splits, classes)]
    if shared := _shared_sequences(splits):
        sections.insert(0, Section("Sequences on both sides", shared))
    if faults:
        lines = "\n\n".join(faults[:SHOWN_FAULTS])
        sections.insert(0, Section(f"{len(faults)} faulty files: training will refuse them", lines))
    sections += [_examples(split, count) for split in splits if split.frames]
    sections += [section for split in splits if (section := _odd(split))]
    if not faults:
        sections.append(_augmented(splits[0].dataset, config))
    write_report(out, f"{data.dataset}: {Path(data.root).resolve().name}", sections)
    return faults


def _read(name: str, dataset: SegmentationDataset) -> _Split:
    """Look at every file, on all cores."""

    def look(index: int) -> _Frame | str:
        try:
            image, label = dataset.load(index)
        except DataError as error:
            return str(error)
        counts = np.bincount(label.ravel(), minlength=256)
        pixels = np.append(counts[: len(dataset.classes)], counts[IGNORE_INDEX])
        return _Frame(index, (label.shape[0], label.shape[1]), float(image.mean()), pixels)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(look, range(len(dataset))))
    faults = [one for one in found if isinstance(one, str)] + dataset.lone_labels()
    if not faults:
        try:
            dataset.check()  # what only shows across files
        except DataError as error:
            faults.append(str(error))
    return _Split(name, dataset, [one for one in found if isinstance(one, _Frame)], faults)


def _overview(splits: Sequence[_Split]) -> Section:
    rows = []
    for split in splits:
        sizes = Counter(frame.size for frame in split.frames)
        common = ", ".join(f"{h}x{w} ({n})" for (h, w), n in sizes.most_common(3))
        total = sum((frame.pixels for frame in split.frames), np.zeros(1, np.int64))
        rows.append(
            {
                "split": split.name,
                "images": len(split.dataset),
                "faulty": len(split.faults),
                "sizes": common + (f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""),
                "ignored": 100 * total[-1] / max(total.sum(), 1),
            }
        )
    columns = [Column(key, key) for key in ("split", "images", "faulty")]
    columns += [Column("sizes", "height x width (images)"), Column("ignored", "ignored %", "{:.1f}")]
    return Section("Splits", table=Table(columns, rows))


def _shared_sequences(splits: Sequence[_Split]) -> str:
    """What to say of sequences that train and validate: frames of one are alike, so that scores flatter."""
    counts = [
        Counter(filter(None, map(split.dataset.sequence, range(len(split.dataset))))) for split in splits
    ]
    shared = sorted(counts[0].keys() & counts[1].keys())
    if not shared:
        return ""
    told = [f"{name} ({counts[0][name]} train, {counts[1][name]} validate)" for name in shared[:SHOWN_SHARED]]
    more = f" and {len(shared) - SHOWN_SHARED} more" if len(shared) > SHOWN_SHARED else ""
    others = sorted(counts[0].keys() - counts[1].keys()) or shared
    return (
        f"Frames of the same sequence, by their names, train and validate: {', '.join(told)}{more}. They are "
        "alike, so validation tells little of places that the network has not seen. To judge by those, "
        f"withhold a whole sequence: --set data.train_on=[train,val] --set 'data.withheld=[\"{others[0]}\"]'"
    )


def _histogram(splits: Sequence[_Split], classes: ClassList) -> Section:
    rows: list[dict[str, Any]] = [{"class": name} for name in classes.names]
    columns = [Column("class", "class")]
    for split in splits:
        pixels = np.array([frame.pixels[:-1] for frame in split.frames]).reshape(-1, len(classes))
        shares = pixels.sum(0) / max(pixels.sum(), 1)
        for row, share, images in zip(rows, shares, (pixels > 0).sum(0), strict=True):
            row[split.name], row[f"{split.name} images"] = 100 * share, int(images)
            row[f"{split.name} bar"] = "█" * round(BAR * np.sqrt(share)) or "·"
        columns += [
            Column(split.name, f"{split.name}: pixels %", "{:.2f}"),
            Column(f"{split.name} images", "in images"),
            Column(f"{split.name} bar", ""),
        ]
    text = "Bars are in proportion to the square root, so that rare classes show."
    missing = [row["class"] for row in rows if not row[f"{SPLITS[0]} images"]]
    if missing:
        text += (
            f"\n\nNo training label holds {', '.join(missing)}: the network cannot learn what it never sees."
        )
    legend = draw_legend(classes.names, range(len(classes)), classes.palette)
    return Section(
        "Classes", text, Table(columns, rows), pictures=[photo(legend, "colours of the classes below")]
    )


def _examples(split: _Split, count: int) -> Section:
    places = np.unique(np.linspace(0, len(split.frames) - 1, count).round().astype(int))
    pictures = [_pair(split, split.frames[place]) for place in places]
    text = f"{len(pictures)} of {len(split.frames)}, evenly spread: image, and labels over it."
    return Section(f"{split.name}: labels", text, pictures=pictures)


def _odd(split: _Split) -> Section | None:
    """Frames that are unlike the others; most reasons first."""
    if not split.frames:
        return None
    pixels = np.array([frame.pixels[:-1] for frame in split.frames])
    rare = [number for number, shown in enumerate((pixels > 0).mean(0)) if 0 < shown <= RARE]
    few = FEW * np.median((pixels > 0).sum(1))
    usual = Counter(frame.size for frame in split.frames).most_common(1)
    found = [
        (frame, list(_reasons(frame, split.dataset.classes, rare, few, usual[0][0])))
        for frame in split.frames
    ]
    found = sorted((pair for pair in found if pair[1]), key=lambda pair: -len(pair[1]))
    if not found:
        return None
    pictures = [_pair(split, frame, "; ".join(reasons)) for frame, reasons in found[:SHOWN_ODD]]
    text = f"{len(found)} frames look odd; they need not be wrong." + (
        f" The first {SHOWN_ODD}:" if len(found) > SHOWN_ODD else ""
    )
    return Section(f"{split.name}: odd frames", text, pictures=pictures)


def _reasons(
    frame: _Frame, classes: ClassList, rare: Iterable[int], few: float, usual: tuple[int, int]
) -> Iterable[str]:
    total, own = frame.pixels.sum(), frame.pixels[:-1]
    largest = int(own.argmax())
    if frame.pixels[-1] > MOST_IGNORED * total:
        yield f"{100 * frame.pixels[-1] / total:.0f}% ignored"
    if own.sum() and own[largest] > MOST_ONE_CLASS * own.sum():
        yield f"nearly all {classes.names[largest]}"
    if (own > 0).sum() < few:
        yield f"{(own > 0).sum()} classes"
    if not DARK <= frame.brightness <= BRIGHT:
        yield "very dark" if frame.brightness < DARK else "very bright"
    if frame.size != usual:
        yield f"{frame.size[0]}x{frame.size[1]} px, most are {usual[0]}x{usual[1]}"
    for number in rare:
        if own[number]:
            yield f"holds the rare {classes.names[number]}"


def _pair(split: _Split, frame: _Frame, more: str = "") -> Picture:
    image, label = split.dataset.load(frame.index)
    name = split.dataset.name(frame.index) + (f": {more}" if more else "")
    return _show(image, label, split.dataset.classes, name)


def _show(image: Image, label: NDArray[Any], classes: ClassList, caption: str) -> Picture:
    """Image and labels beside each other, shrunk to the page."""
    pictures = (image, overlay(image, label, classes.palette, 0.6))
    return photo(side_by_side([("", shrink(one, WIDTH)) for one in pictures]), caption)


def _augmented(dataset: SegmentationDataset, config: Config) -> Section:
    """The first batch as training sees it."""
    images, labels = next(iter(training_batches(dataset, config, 0, 1)))[:2]
    mean, std = np.array(config.data.mean), np.array(config.data.std)
    pictures = []
    for image, label in zip(images, labels, strict=True):
        pixels = 255 * (image.permute(1, 2, 0).numpy() * std + mean)
        shown = np.ascontiguousarray(pixels.round().clip(0, 255).astype(np.uint8))
        pictures.append(_show(shown, label.numpy().astype(np.uint8), dataset.classes, ""))
    text = "The first batch of training: crop, scale, flip, light and colour by the config's data keys."
    return Section("Augmentation", text, pictures=pictures)
