"""`classes.yaml`: what the values and colours in labels mean, of one's own and of known data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_seg.config import read_yaml
from sparse_seg.errors import ConfigError, choose_one, did_you_mean, shown

Colour = tuple[int, int, int]

IGNORE_INDEX = 255
"""Train id of pixels that neither the loss nor the metrics count."""

CLASS_SETS = ("voc", "cityscapes", "camvid", "ade20k", "coco-stuff")
"""Those that are known by name."""

MOST_CLASSES = 254  # train ids below those of unknown and ignored labels
_KEYS = ("names", "ids", "colours", "ignore", "ignore_colours", "rgb_ids")


@dataclass(frozen=True)
class ClassList:
    """Names and RGB colours of the classes; the position in both is the train id."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...]

    def __len__(self) -> int:
        return len(self.names)


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
        values = {train_id: value for value, train_id in self.train_ids.items()}
        return tuple(values[train_id] for train_id in range(len(self.classes)))


def read_classes(name: str | Path) -> ClassFile:
    """The classes of a set in `CLASS_SETS`, or of a `classes.yaml`.

    Raises:
        ConfigError: no such set or file, or the file says what cannot be.
    """
    if name in CLASS_SETS:
        return read_class_file(Path(__file__).parent / "classes" / f"{name}.yaml")
    if not Path(name).is_file():
        raise ConfigError(f"unknown classes {choose_one(str(name), CLASS_SETS)}, or a classes.yaml file")
    return read_class_file(name)


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
    names = _list(file, "names", tree.get("names"), _is_name, "texts, such as [road, sky]")
    if not 2 <= len(names) <= MOST_CLASSES:
        raise ConfigError(
            f"{file}: names has {len(names)} classes; give 2 to {MOST_CLASSES}, the background being one"
        )
    _differ(file, "names", names)
    count, byte, triple = len(names), "whole numbers from 0 to 255", "[r, g, b], each from 0 to 255"
    ids = _list(file, "ids", tree.get("ids", list(range(count))), _is_byte, byte, count)
    ignored = _list(file, "ignore", tree.get("ignore", [] if 255 in ids else [255]), _is_byte, byte)
    wanted = count if "colours" in tree else None
    colours = _list(file, "colours", tree.get("colours", []), _is_colour, triple, wanted)
    not_counted = _list(file, "ignore_colours", tree.get("ignore_colours", []), _is_colour, triple)
    _differ(file, "ids and ignore", [*ids, *ignored])
    _differ(file, "colours and ignore_colours", [*colours, *not_counted])
    if not_counted and not ignored:
        raise ConfigError(f"{file}: ignore_colours needs a value in ignore; add one, such as 255")
    rgb_ids = tree.get("rgb_ids", False)
    if not isinstance(rgb_ids, bool) or (rgb_ids and colours):
        raise ConfigError(
            f"{file}: rgb_ids is {shown(rgb_ids)}; give true or false, true without colours only"
        )
    train_ids = dict.fromkeys(ignored, IGNORE_INDEX) | {value: number for number, value in enumerate(ids)}
    palette = tuple((red, green, blue) for red, green, blue in colours) or default_palette(count)
    ids_of_colours = dict(zip(palette, ids, strict=True)) if colours else {}
    if colours and not_counted:
        ids_of_colours |= dict.fromkeys(((red, green, blue) for red, green, blue in not_counted), ignored[0])
    return ClassFile(ClassList(tuple(names), palette), train_ids, ids_of_colours, rgb_ids)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_byte(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_byte, value))


def _list(
    file: str | Path, key: str, given: Any, fits: Callable[[Any], bool], what: str, count: int | None = None
) -> list[Any]:
    """Raises a ConfigError unless a value is a list of what fits, so many where `count` tells."""
    if not isinstance(given, list) or not all(map(fits, given)):
        raise ConfigError(f"{file}: {key} is {shown(given)}; it must be a list of {what}")
    if count is not None and len(given) != count:
        raise ConfigError(f"{file}: {key} has {len(given)} values for {count} names; give one for each")
    return given


def _differ(file: str | Path, keys: str, values: list[Any]) -> None:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ConfigError(f"{file}: {keys}: {shown(value)} stands twice; each may stand once")


def default_palette(count: int) -> tuple[Colour, ...]:
    """Colours for classes that have none, PASCAL VOC's: the bits of a class's number, dealt out to red, green
    and blue in turn, the lowest to each channel's highest. The first 256 differ; the first is black."""
    return tuple((_channel(number), _channel(number >> 1), _channel(number >> 2)) for number in range(count))


def _channel(bits: int) -> int:
    """Every third bit, from the lowest on, in the order turned round."""
    return sum((bits >> 3 * place & 1) << 7 - place for place in range(8))
