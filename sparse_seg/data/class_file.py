"""`classes.yaml`: what the values and colours in labels of one's own mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_seg.config import read_yaml
from sparse_seg.data.dataset import IGNORE_INDEX, ClassList, label_ids
from sparse_seg.data.palette import Colour, default_palette
from sparse_seg.errors import ConfigError, did_you_mean, shown

MOST_CLASSES = 254  # train ids below those of unknown and ignored labels
_KEYS = ("names", "ids", "colours", "ignore", "ignore_colours", "rgb_ids")


@dataclass(frozen=True)
class ClassFile:
    """The classes, the train id of each label value, and the label value of each colour.

    `ids_of_colours` is empty where the file gives no colours: labels then hold ids, and the classes have the
    default palette. With `rgb_ids` labels may also hold each id three times, as red, green and blue.
    """

    classes: ClassList
    train_ids: Mapping[int, int]
    ids_of_colours: Mapping[Colour, int]
    rgb_ids: bool = False

    @property
    def ids(self) -> tuple[int, ...]:
        """The value of each class in labels."""
        return label_ids(self.train_ids, len(self.classes))


def read_class_file(file: str | Path) -> ClassFile:
    """Read a YAML file with the keys

    - `names`: of the classes, in the order of their train ids;
    - `ids`: the value in labels of each; default 0, 1, ...;
    - `colours`: RGB of each, `[r, g, b]` in 0..255, of pictures and of labels that hold colours;
    - `ignore`: values in labels that do not count; default [255], unless that is a class's;
    - `ignore_colours`: colours in labels that do not count;
    - `rgb_ids`: true where labels saved as RGB hold ids, the same in all three channels.

    Raises:
        ConfigError: missing or no YAML, or a key's value cannot be; one line names it.
    """
    tree = read_yaml(file)
    for key in tree:
        if key not in _KEYS:
            near = did_you_mean(str(key), _KEYS) or f"; it may have {', '.join(_KEYS)}"
            raise ConfigError(f"{file}: unknown key {shown(key)}{near}")
    names = _names(file, tree.get("names"))
    ids = _ids(file, "ids", tree.get("ids", list(range(len(names)))), len(names))
    ignored = _ids(file, "ignore", tree.get("ignore", [] if 255 in ids else [255]))
    colours = _colours(file, "colours", tree["colours"], len(names)) if "colours" in tree else []
    ignored_colours = _colours(file, "ignore_colours", tree.get("ignore_colours", []))
    _differ(file, "ids and ignore", [*ids, *ignored])
    _differ(file, "colours and ignore_colours", [*colours, *ignored_colours])
    if ignored_colours and not ignored:
        raise ConfigError(f"{file}: ignore_colours needs a value in ignore; add one, such as 255")
    rgb_ids = tree.get("rgb_ids", False)
    if not isinstance(rgb_ids, bool) or (rgb_ids and colours):
        raise ConfigError(
            f"{file}: rgb_ids is {shown(rgb_ids)}; give true or false, true without colours only"
        )
    train_ids = dict.fromkeys(ignored, IGNORE_INDEX) | {value: number for number, value in enumerate(ids)}
    ids_of_colours = dict(zip(colours, ids, strict=False)) | dict.fromkeys(
        ignored_colours, (ignored or [0])[0]
    )
    palette = tuple(colours) or default_palette(len(names))
    return ClassFile(ClassList(tuple(names), palette), train_ids, ids_of_colours if colours else {}, rgb_ids)


def _names(file: str | Path, given: Any) -> list[str]:
    """Raises a ConfigError unless there are two names or more, all different."""
    if not isinstance(given, list) or not all(isinstance(name, str) and name.strip() for name in given):
        raise ConfigError(f"{file}: names is {shown(given)}; it must be a list of texts, such as [road, sky]")
    if not 2 <= len(given) <= MOST_CLASSES:
        raise ConfigError(
            f"{file}: names has {len(given)} classes; give 2 to {MOST_CLASSES}, the background being one"
        )
    _differ(file, "names", given)
    return given


def _ids(file: str | Path, key: str, given: Any, count: int | None = None) -> list[int]:
    """Raises a ConfigError unless all are whole numbers from 0 to 255."""
    if not isinstance(given, list) or not all(type(value) is int and 0 <= value <= 255 for value in given):
        raise ConfigError(
            f"{file}: {key} is {shown(given)}; it must be a list of whole numbers from 0 to 255"
        )
    _require_count(file, key, given, count)
    return given


def _colours(file: str | Path, key: str, given: Any, count: int | None = None) -> list[Colour]:
    """Raises a ConfigError unless all are three whole numbers from 0 to 255."""
    entries: list[Any] = given if isinstance(given, list) else [None]
    for entry in entries:
        fits = isinstance(entry, list) and len(entry) == 3
        if not fits or not all(type(value) is int and 0 <= value <= 255 for value in entry):
            raise ConfigError(
                f"{file}: {key} is {shown(given)}; it must be a list of [r, g, b], each from 0 to 255"
            )
    _require_count(file, key, given, count)
    return [(entry[0], entry[1], entry[2]) for entry in entries]


def _require_count(file: str | Path, key: str, given: list[Any], count: int | None) -> None:
    if count is not None and len(given) != count:
        raise ConfigError(f"{file}: {key} has {len(given)} values for {count} names; give one for each")


def _differ(file: str | Path, keys: str, values: Iterable[Any]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            shows = list(value) if isinstance(value, tuple) else value
            raise ConfigError(f"{file}: {keys}: {shown(shows)} stands twice; each may stand once")
        seen.add(value)
