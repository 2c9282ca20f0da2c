"""What every dataset gives: image and label pairs, a class list, and a check to run before step 1."""

from __future__ import annotations

import functools
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from sparse_seg.data.class_file import IGNORE_INDEX, ClassFile, ClassList
from sparse_seg.data.depth import Depth, find_depth
from sparse_seg.data.reading import Decoded, Image, decode_image, read_image, read_label
from sparse_seg.errors import DataError

__all__ = ["IGNORE_INDEX", "SMALLEST_SIDE", "ClassList", "Image", "SegmentationDataset", "read_image"]

SMALLEST_SIDE = 32
"""Pixels; on smaller images the coarsest stage of a network has no cell left."""

_NO_SUCH_LABEL = 254  # a stored value outside the dataset's list; never leaves this module

_LOG = logging.getLogger(__name__)


class Seen(NamedTuple):
    """Of a sample: the image's highest value if above its bits, else 0, pixels of each label value, size."""

    above: int
    values: NDArray[np.int64]
    size: tuple[int, int]


class SegmentationDataset(Dataset[tuple[Image, Image]]):
    """Image and label pairs on disk. A subclass sets the two attributes and lists the files.

    Attributes:
        classes: names and colours by train id.
        train_ids: the train id of each label value on disk; other values are errors.
        bits: how many of 16 bits per channel the images use; None: `depth` finds out.
        all_images: lists those of all the data set's splits, which `depth` looks at.
        frame_size: height and width of the median frame, by area, px; None before `check`.

    Args:
        samples: (image, label) paths; the label file need not exist before `check`.
        label_files: every label file found, so that `check` can report labels without an image.
    """

    classes: ClassList
    train_ids: Mapping[int, int]
    bits: int | None = None
    frame_size: tuple[int, int] | None = None
    hint = "choose the dataset it belongs to"  # where label values are unknown

    @classmethod
    def known_in(cls, root: str | Path) -> ClassFile:
        """The classes of the dataset in a folder, without its images."""
        return ClassFile(cls.classes, cls.train_ids, {})

    def __init__(self, samples: list[tuple[Path, Path]], label_files: Sequence[Path]) -> None:
        self.samples, paired = samples, {label for _, label in samples}
        self._lone_labels = [label for label in label_files if label not in paired]
        self.all_images: Callable[[], Sequence[Path]] = tuple
        self._lookup = np.full(256, _NO_SUCH_LABEL, np.uint8)
        for value, train_id in self.train_ids.items():
            self._lookup[value] = train_id

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image, Image]:
        return self.load(index)

    def name(self, index: int) -> str:
        """The sample's name in reports and output files."""
        return self.samples[index][0].stem

    def sequence(self, index: int) -> str | None:
        """The drive or place that a frame is of, as its name tells: its folder, or what stands before the
        first `_` or `-` if that has a digit, as in `0016E5_07959`; None: it tells nothing."""
        folder, _, stem = self.name(index).rpartition("/")
        first = re.split("[_-]", stem)[0]
        return folder or (first if first != stem and re.search(r"\d", first) else None)

    def join(self, other: SegmentationDataset) -> None:
        """Take another split's frames, too."""
        self.samples = [*self.samples, *other.samples]
        self._lone_labels += other._lone_labels

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Leave out the frames whose names are not wanted."""
        self.samples = [pair for index, pair in enumerate(self.samples) if wanted(self.name(index))]

    def files(self) -> Iterator[Path]:
        """Every file that the split is read from."""
        yield from self._lone_labels
        for pair in self.samples:
            yield from pair

    def starts(self, index: int) -> bool:
        """Whether a video begins with this sample: what a mask policy knows of the one before is void."""
        return index == 0 or self.sequence(index) != self.sequence(index - 1)

    def load(self, index: int) -> tuple[Image, Image]:
        """Image `[H, W, 3]` uint8 RGB and label `[H, W]` uint8 of train ids, 255 where ignored.

        Raises:
            DataError: a file is missing or unreadable, the sizes differ or a label value is unknown.
        """
        picture, values = self._read(index)
        return picture.pixels, np.asarray(cv2.LUT(values, self._lookup), np.uint8)

    def ids(self, file: Path, stored: Image) -> Image:
        """Label values `[H, W]` from what a file holds, `[H, W]` ids or `[H, W, 3]` colours.

        Raises:
            DataError: it holds colours; a subclass may know them.
        """
        if stored.ndim != 2:
            raise DataError(
                f"{file}: the label is 3-channel {stored.dtype}; save it as a single-channel 8-bit PNG of "
                "class ids, not of colours"
            )
        return stored

    @functools.cached_property
    def depth(self) -> Depth:
        """How many bits the images of all splits use; one answer for the whole data set."""
        own, setting = {image for image, _ in self.samples}, "set data.bits"
        found = find_depth(sorted(own), self.bits, setting)
        unsure = self.bits is None and found.bits is not None
        return find_depth(sorted({*own, *self.all_images()}), None, setting) if unsure else found

    def _read(self, index: int) -> tuple[Decoded, Image]:
        """The picture, and the label's stored values `[H, W]` uint8, those of `train_ids` alone."""
        image_file, label_file = self.samples[index]
        if not os.path.lexists(label_file):
            raise DataError(f"{image_file}: its label {label_file} is missing; add it or remove the image")
        picture = decode_image(image_file, bits=self.depth.bits)
        values = self.ids(label_file, read_label(label_file))
        unknown = np.asarray(cv2.LUT(values, self._lookup)) == _NO_SUCH_LABEL
        if unknown.any():
            found, known = np.unique(values[unknown]), np.flatnonzero(self._lookup != _NO_SUCH_LABEL)
            raise DataError(
                f"{label_file}: label values {some(found.tolist())} ({unknown.sum()} px) are not in this "
                f"dataset's list {ranges(known)}; fix the file or {self.hint}"
            )
        if picture.pixels.shape[:2] != values.shape:
            raise DataError(
                f"{label_file}: the label is {_size(values)} but its image {image_file} is "
                f"{_size(picture.pixels)}; resize the label with nearest neighbour or replace the pair"
            )
        return picture, values

    def check(self, limit: int | None = None) -> NDArray[np.int64]:
        """Read every file once, on all cores; what looks odd is logged as a warning.

        Args:
            limit: how many images, from the first, are used; they must hold a pixel of a class.

        Returns:
            How many pixels each class has, `[K]`.

        Raises:
            DataError: names the first faulty file, what to do, and how many files are faulty; or no pixel
                belongs to a class.
        """
        faults = self.lone_labels()
        if self.depth.note:
            self.warn(self.depth.note)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(self._inspected, range(len(self))))
        seen = [result for result in results if not isinstance(result, str)]
        faults += [result for result in results if isinstance(result, str)]
        if faults:
            more = f" (faulty files in all: {len(faults)}; sparse-seg browse lists them)"
            raise DataError(faults[0] + (more if len(faults) > 1 else ""))
        if above := [(one.above, index) for index, one in enumerate(seen) if one.above]:
            first, highest = self.samples[above[0][1]][0].name, max(above)[0]
            self.warn(
                f"{len(above)} of {len(seen)} images have values up to {highest}, such as {first}: read as "
                f"{self.depth.bits}-bit pictures, they are clipped; set data.bits"
            )
        sizes = sorted((one.size for one in seen), key=math.prod)
        self.frame_size = sizes[len(sizes) // 2]
        counts = np.array([one.values for one in seen])
        if limit is not None and limit < len(self):
            self._class_counts(counts[:limit].sum(0), limit)
        return self._check_values(counts.sum(0))

    def lone_labels(self) -> list[str]:
        """A message for each label file without an image."""
        fault = "no image belongs to this label; add the image or remove the label"
        return [f"{label}: {fault}" for label in self._lone_labels]

    def _inspected(self, index: int) -> Seen | str:
        """What `_inspect` sees, or a fault."""
        try:
            return self._inspect(index)
        except DataError as error:
            return str(error)

    def _inspect(self, index: int) -> Seen:
        """Read a sample for `check`. Raises a DataError where it is faulty; a subclass may look closer."""
        picture, values = self._read(index)
        if min(values.shape) < SMALLEST_SIDE:
            file, size = self.samples[index][0], _size(values)
            raise DataError(
                f"{file}: the image is {size}; use images of {SMALLEST_SIDE}x{SMALLEST_SIDE} or more"
            )
        histogram = cv2.calcHist([values], [0], None, [256], [0, 256])
        above = picture.highest if picture.highest >> picture.bits else 0
        return Seen(above, histogram.ravel().astype(np.int64), (values.shape[0], values.shape[1]))

    def _check_values(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Pixels of each class, `[K]`, from those of each label value, `[256]`; a subclass may look closer.

        Raises:
            DataError: there is none.
        """
        classes = self._class_counts(counts, len(self))
        if (classes > 0).sum() == 1:
            ignored = [int(value) for value in np.flatnonzero(counts * (self._lookup == IGNORE_INDEX))]
            others = f"; the values {ranges(ignored)} are ignored" if ignored else ""
            name = self.classes.names[int(classes.argmax())]
            self.warn(f"all labelled pixels are of one class, {name!r}{others}")
        return classes

    def _class_counts(self, counts: NDArray[np.int64], images: int) -> NDArray[np.int64]:
        classes = np.zeros(256, np.int64)
        np.add.at(classes, self._lookup, counts)
        if not classes[: len(self.classes)].any():
            own = [value for value, train_id in self.train_ids.items() if train_id != IGNORE_INDEX]
            raise DataError(
                f"{self.label_folder}: no pixel of {images} labels belongs to a class: their values are "
                f"{ranges(np.flatnonzero(counts))}, all ignored; label values of classes are "
                f"{ranges(sorted(own))}"
            )
        return classes[: len(self.classes)]

    @property
    def label_folder(self) -> Path:
        """The innermost folder that holds all labels."""
        return Path(os.path.commonpath([label.parent for _, label in self.samples]))

    def warn(self, message: str) -> None:
        """Log a warning about the split."""
        _LOG.warning("warning: %s: %s", self.label_folder, message)


def _size(image: Image) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def some(values: list[Any]) -> str:
    """The first five."""
    return str(values) if len(values) <= 5 else f"{str(values[:5])[:-1]}, ...]"


def ranges(values: Iterable[int]) -> str:
    """`[0, 1, 2, 255]` as `0..2, 255`."""
    runs: list[list[int]] = []
    for value in map(int, values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in runs)
