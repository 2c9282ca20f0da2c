"""What every dataset gives: image and label pairs, a class list, and a check to run before step 1."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from sparse_seg.errors import DataError

IGNORE_INDEX = 255
"""Train id of pixels that neither the loss nor the metrics count."""

SMALLEST_SIDE = 32
"""Pixels; on smaller images the coarsest stage of a network has no cell left."""

_NO_SUCH_LABEL = 254  # a stored value outside the dataset's list; never leaves this module
_END_OF_FILE = {b"\x89PNG": b"IEND\xaeB`\x82", b"\xff\xd8\xff": b"\xff\xd9"}  # first bytes -> last bytes

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class ClassList:
    """Names and RGB colours of the classes; the position in both is the train id."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.palette):
            raise ValueError(f"{len(self.names)} class names but {len(self.palette)} colours")

    def __len__(self) -> int:
        return len(self.names)


class SegmentationDataset(Dataset[tuple[Image, Image]]):
    """Image and label pairs on disk. A subclass sets the two attributes and lists the files.

    Attributes:
        classes: names and colours by train id.
        train_ids: the train id of each label value on disk; other values are errors.

    Args:
        samples: (image, label) paths; the label file need not exist before `check`.
        label_files: every label file found, so that `check` can report labels without an image.
    """

    classes: ClassVar[ClassList]
    train_ids: ClassVar[dict[int, int]]

    def __init__(self, samples: list[tuple[Path, Path]], label_files: Sequence[Path]) -> None:
        self.samples = samples
        self._label_files = label_files
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

    def load(self, index: int) -> tuple[Image, Image]:
        """Image `[H, W, 3]` uint8 RGB and label `[H, W]` uint8 of train ids, 255 where ignored.

        Raises:
            DataError: a file is missing or unreadable, the sizes differ or a label value is unknown.
        """
        image_file, label_file = self.samples[index]
        if not label_file.is_file():
            raise DataError(f"{image_file}: its label {label_file} is missing; add it or remove the image")
        image = read_image(image_file)
        stored = _read_label(label_file)
        if image.shape[:2] != stored.shape:
            raise DataError(
                f"{label_file}: the label is {_size(stored)} but its image {image_file} is {_size(image)}; "
                "resize the label with nearest neighbour or replace the pair"
            )
        label = self._lookup[stored]
        if (label == _NO_SUCH_LABEL).any():
            unknown = np.unique(stored[label == _NO_SUCH_LABEL]).tolist()
            raise DataError(
                f"{label_file}: label values {unknown} are not in this dataset's list "
                f"{_ranges(np.flatnonzero(self._lookup != _NO_SUCH_LABEL).tolist())}; fix the file or choose "
                "the dataset it belongs to"
            )
        return image, label

    def check(self) -> None:
        """Reads every file once, on all cores.

        Raises:
            DataError: names the first faulty file, what to do, and how many files are faulty.
        """
        paired = {label for _, label in self.samples}
        faults = [
            f"{label}: no image belongs to this label; add the image or remove the label"
            for label in self._label_files
            if label not in paired
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            faults += [fault for fault in pool.map(self._fault, range(len(self))) if fault]
        if len(faults) > 1:
            raise DataError(f"{faults[0]} (faulty files in all: {len(faults)})")
        if faults:
            raise DataError(faults[0])

    def _fault(self, index: int) -> str | None:
        try:
            image, _ = self.load(index)
        except DataError as error:
            return str(error)
        if min(image.shape[:2]) < SMALLEST_SIDE:
            file = self.samples[index][0]
            return (
                f"{file}: the image is {_size(image)}; use images of {SMALLEST_SIDE}x{SMALLEST_SIDE} or more"
            )
        return None


def list_files(folder: Path, pattern: str) -> list[Path]:
    """Files in `folder` that match `pattern`, sorted.

    Raises:
        DataError: the folder does not exist.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; check the dataset's root and split")
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def read_image(file: Path) -> Image:
    """Decodes an image file to `[H, W, 3]` uint8 RGB, in the orientation its pixels are stored in.

    Raises:
        DataError: the file is missing, truncated or not an image.
    """
    image = _decode(file, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return np.ascontiguousarray(image[..., ::-1])


def _read_label(file: Path) -> Image:
    label = _decode(file, cv2.IMREAD_UNCHANGED)
    if label.ndim != 2 or label.dtype != np.uint8:
        channels = 1 if label.ndim == 2 else label.shape[2]
        raise DataError(
            f"{file}: the label is {channels}-channel {label.dtype}; "
            "save it as a single-channel 8-bit PNG of class ids, not of colours"
        )
    return label


def _decode(file: Path, flags: int) -> NDArray[Any]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"{file}: cannot be read ({error.strerror}); check the path and its rights"
        ) from error
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if _is_complete(data) else None
    except cv2.error:  # instead of None, where the header promises an impossible size
        image = None
    if image is None:
        raise DataError(f"{file}: truncated, corrupt or not an image; restore it from the original dataset")
    return image


def _is_complete(data: bytes) -> bool:
    """Whether the format's end marker is there; some OpenCV versions fill in truncated files silently."""
    for start, end in _END_OF_FILE.items():
        if data.startswith(start):
            return data.find(end, len(data) // 2) >= 0
    return len(data) > 0


def _size(image: Image) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def _ranges(values: list[int]) -> str:
    """`[0, 1, 2, 255]` as `0..2, 255`."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in runs)
