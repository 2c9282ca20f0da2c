"""A config key: its type and default are a dataclass field, everything else is in the field's metadata."""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

MAX_ITEMS = 256  # of a list whose key does not tell
_T = TypeVar("_T")


@dataclass(frozen=True)
class Key:
    """Metadata of a key beyond its name, type and default."""

    meaning: str  # one line
    bounds: str = ""  # interval of a number, or of each in a list: "[0, 1)"; a bracket includes the bound
    choices: Collection[Any] = ()  # valid values, a tuple or a registry
    items: tuple[str, ...] | int = MAX_ITEMS  # a list's length: its items' names, or how many at most
    function: bool = False  # part of what the network computes, so that a checkpoint fits one value only
    above: str = ""  # what to say of a number above its bounds
    path: bool = False  # a file or folder, in whose name `~` stands for the home folder

    @property
    def interval(self) -> tuple[float, float]:
        """Lowest and highest number."""
        low, high = self.bounds[1:-1].split(",")
        return float(low), float(high)

    def allows(self, number: float) -> bool:
        """Whether a number lies in the bounds."""
        low, high = self.interval
        above_low = number >= low if self.bounds[0] == "[" else number > low
        return above_low and (number <= high if self.bounds[-1] == "]" else number < high)


def key(default: Any, meaning: str, valid: str | Collection[Any] = "", **more: Any) -> Any:
    """The dataclass field of a key; `valid` are bounds or choices, for the rest see `Key`."""
    bounds, choices = (valid, ()) if isinstance(valid, str) else ("", valid)
    metadata = {"key": Key(meaning, bounds, choices, **more)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def function_key(default: Any, meaning: str, valid: str | Collection[Any] = "", **more: Any) -> Any:
    """As `key`, for what is part of the function that the network computes."""
    return key(default, meaning, valid, function=True, **more)


def section(schema: type[_T]) -> _T:
    """The dataclass field of a section, with its defaults."""
    return dataclasses.field(default_factory=schema)


def all_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Key, Any, Any]]:
    """Full name, `Key`, type and default of each key, including keys of sections."""
    kinds = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            yield from all_keys(cast(type, kind), f"{prefix}{field.name}.")
        elif "key" in field.metadata:
            made = field.default is dataclasses.MISSING
            default = cast(Any, field.default_factory)() if made else field.default
            yield f"{prefix}{field.name}", field.metadata["key"], kind, default


def choices(schema: type, name: str) -> tuple[Any, ...]:
    """Valid values of a key; none where any, or any within bounds, is valid."""
    return next(tuple(info.choices) for key_name, info, _, _ in all_keys(schema) if key_name == name)


def function_keys(schema: type) -> list[str]:
    """Names of the keys that are part of what the network computes."""
    return [name for name, info, _, _ in all_keys(schema) if info.function]


def plain_type(kind: Any) -> tuple[Any, bool]:
    """A type without None, and whether it may be None."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (plain,) = (one for one in typing.get_args(kind) if one is not type(None))
        return plain, True
    return kind, False


def item_type(kind: Any) -> Any:
    """The type of a list's items; None for what is no list."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else None


def type_name(kind: Any) -> str:
    """A type as messages and docs call it."""
    plain, optional = plain_type(kind)
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    item = item_type(plain)
    name = f"a list, each {type_name(item)}" if item else names.get(plain, "names with values")
    return f"{name}, or null" if optional else name
