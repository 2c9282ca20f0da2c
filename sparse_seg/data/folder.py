"""Own data: `{split}/images/**`, `{split}/labels/**` with the same names, and `classes.yaml`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparse_seg.data.class_file import ClassFile, ClassList, read_class_file
from sparse_seg.data.dataset import Seen, SegmentationDataset, some
from sparse_seg.data.listing import pair_files
from sparse_seg.data.reading import IMAGE_SUFFIXES, Image, read_label_palette
from sparse_seg.errors import ConfigError, DataError

CLASS_FILE = "classes.yaml"
MANY = 10  # unknown colours in a label: no class has been forgotten, edges were smoothed


class FolderDataset(SegmentationDataset):
    """Images and PNG labels in any sub-folders; see `read_class_file` for what the labels may hold.

    Grey labels hold ids, and so do the indices of palette labels; RGB labels hold the classes' colours. A
    split without `labels` can be predicted, but not trained or evaluated on.

    Args:
        root: the folder that holds the splits and `classes.yaml`.
        split: a folder in it.

    Raises:
        ConfigError: `classes.yaml` is missing or says what cannot be.
        DataError: a folder is missing or holds no image, or two images share a name.
    """

    classes = ClassList((), ())  # in `classes.yaml`
    hint = f"add them to ids or ignore in {CLASS_FILE}"

    @classmethod
    def known_in(cls, root: str | Path) -> ClassFile:
        if not Path(root).is_dir():
            raise DataError(f"{root}: no such folder; set data.root to the dataset's folder")
        file = Path(root, CLASS_FILE)
        if not file.exists():
            raise ConfigError(f"{file} does not exist; write it, with a line such as names: [road, sky]")
        return read_class_file(file)

    def __init__(self, root: str | Path, split: str) -> None:
        self.class_file, self._known = Path(root, CLASS_FILE), self.known_in(root)
        self.classes, self.train_ids = self._known.classes, self._known.train_ids
        self._images, self._labels = Path(root, split, "images"), Path(root, split, "labels")
        self._folders = [self._images]
        super().__init__(*pair_files(self._images, self._labels, IMAGE_SUFFIXES, needs_labels=False))

    def files(self) -> Iterator[Path]:
        yield self.class_file
        yield from super().files()

    def check(self, limit: int | None = None) -> NDArray[np.int64]:
        if not self._labels.is_dir():
            raise DataError(
                f"{self._labels}: no such folder; a split without labels can be predicted, but neither "
                "trained nor evaluated on"
            )
        return super().check(limit)

    def name(self, index: int) -> str:
        """The path below `images`, without its suffix."""
        image = self.samples[index][0]
        below = next(one for one in self._folders if image.is_relative_to(one))
        return image.relative_to(below).with_suffix("").as_posix()

    def join(self, other: SegmentationDataset) -> None:
        super().join(other)
        assert isinstance(other, FolderDataset)
        self._folders += other._folders

    def ids(self, file: Path, stored: Image) -> Image:
        if stored.ndim == 2:
            return stored
        if not self._known.ids_of_colours:
            return self._repeated_ids(file, stored)
        red, green, blue = np.moveaxis(stored.astype(np.int32), -1, 0)
        packed = red << 16 | green << 8 | blue
        ids = self._table[packed]
        if (ids < 0).any():
            unknown = np.unique(packed[ids < 0])
            colours = [[int(value) >> shift & 255 for shift in (16, 8, 0)] for value in unknown[:6]]
            smooth = " (so many are of smoothed edges: save labels without antialiasing)"
            raise DataError(
                f"{file}: colours {some(colours)} ({(ids < 0).sum()} px) are not in {self.class_file}; add "
                f"them to colours or ignore_colours, or fix the file{smooth if len(unknown) > MANY else ''}"
            )
        return ids.astype(np.uint8)

    def _repeated_ids(self, file: Path, stored: Image) -> Image:
        """Ids `[H, W]` that each stand in all channels of `[H, W, 3]`.

        Raises:
            DataError: they do not, or it is not said that they may.
        """
        is_grey = (stored == stored[..., :1]).all()
        if is_grey and self._known.rgb_ids:
            return np.ascontiguousarray(stored[..., 0])
        reason = f"the label holds colours, and {self.class_file} has none; add colours to it"
        if is_grey:
            reason += ", or, as red, green and blue are the same, read them as ids: add rgb_ids: true"
        raise DataError(f"{file}: {reason}")

    @functools.cached_property
    def _table(self) -> NDArray[np.int16]:
        """The label value of each of 2^24 colours, -1 of unknown ones."""
        table = np.full(1 << 24, -1, np.int16)
        for (red, green, blue), value in self._known.ids_of_colours.items():
            table[red << 16 | green << 8 | blue] = value
        return table

    def _inspect(self, index: int) -> Seen:
        """Raises also for a palette that shows each index in a class's colour, but not in its own: which one
        counts?"""
        seen, file, said = super()._inspect(index), self.samples[index][1], self._known.ids_of_colours
        palette = read_label_palette(file) if said else []
        used = {value: colour for value, colour in enumerate(palette) if seen.values[value]}
        if all(colour in said for colour in used.values()):  # else a palette of another kind
            for value, colour in used.items():
                if said[colour] != value:
                    raise DataError(
                        f"{file}: index {value} has the colour {list(colour)}, which {self.class_file} gives "
                        f"the id {said[colour]}; save the label as RGB, or with ids as its indices"
                    )
        return seen
