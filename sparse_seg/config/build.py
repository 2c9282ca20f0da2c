"""From plain keys and values to the dataclasses of a schema, checked key by key."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import typing
import unicodedata
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, TypeVar

from sparse_seg.config.keys import Key, all_keys, item_type, plain_type, type_name
from sparse_seg.errors import ConfigError, choose_one, did_you_mean, shown

MAX_TEXT = 4096  # characters
_T = TypeVar("_T")


def build(schema: type[_T], tree: Any, where: str, prefix: str = "", root: type | None = None) -> _T:
    """A dataclass from keys and values; bounds and choices are left to `check_values`.

    Args:
        where: names the place in errors.
        prefix, root: of a section, the names it lies in and the schema these start from.

    Raises:
        ConfigError: unknown key, wrong type, or a text that is too long or has control characters.
    """
    if not isinstance(tree, Mapping):
        if not prefix:
            raise ConfigError(f"{where} must hold keys and values, not {shown(tree)}")
        raise ConfigError(f"{where}: '{prefix[:-1]}' holds keys of its own, not the value {shown(tree)}")
    root, kinds, values = root or schema, typing.get_type_hints(schema), dict[str, Any]()
    for name, value in tree.items():
        full = f"{prefix}{name}"
        if name not in kinds:
            near = did_you_mean(full, [f"{prefix}{valid}" for valid in kinds])
            raise ConfigError(f"{where}: unknown key {shown(full)}{near or _elsewhere(root, str(name))}")
        if dataclasses.is_dataclass(kinds[name]):
            values[name] = build(kinds[name], value, where, f"{full}.", root)
        else:
            values[name] = _value(value, kinds[name], f"{where}: '{full}'")
    for name, info, _, _ in all_keys(schema):
        if info.path and values.get(name):
            values[name] = os.path.expanduser(values[name])
    return schema(**values)


def check_values(config: Any, prefix: str = "") -> None:
    """Check the lengths of lists, bounds and choices that the fields' metadata give.

    Raises:
        ConfigError: an impossible value, with the key.
    """
    for name, info, _, _ in all_keys(type(config)):
        value = attrgetter(name)(config)
        if value is not None:
            _check(info, f"{prefix}{name}", value)


def _check(info: Key, name: str, value: Any) -> None:
    numbers = value if isinstance(value, list) else [value]
    if isinstance(info.items, tuple):
        if isinstance(value, list) and len(value) != len(info.items):
            raise ConfigError(f"{name} must be [{', '.join(info.items)}], not {shown(value)}")
    elif not 1 <= len(numbers) <= info.items:
        raise ConfigError(f"{name} has {len(numbers)} values; give 1 to {info.items}")
    if info.choices and value not in info.choices:
        raise ConfigError(f"{name} is {choose_one(value, info.choices)}")
    for number in numbers if info.bounds else []:
        if not info.allows(number):
            hint = f"; {info.above}" if info.above and number > info.interval[1] else ""
            which = "each" if isinstance(value, list) else "it"
            raise ConfigError(f"{name} is {shown(value)}; {which} must lie in {info.bounds}{hint}")


def _value(value: Any, kind: Any, place: str) -> Any:
    """The value as its type has it: a whole number is a number too, but '18' is none, and 18 no text."""
    plain, optional = plain_type(kind)
    if value is None and optional:
        return None
    if typing.get_origin(plain) is dict:
        return _options(value, place)
    item = item_type(plain)
    if item and isinstance(value, list):
        return [_value(one, item, f"{place}, item {number},") for number, one in enumerate(value, 1)]
    kinds: Any = list if item else (int, float) if plain is float else plain
    if not isinstance(value, kinds) or isinstance(value, bool) != (plain is bool):
        hint = "; put it in quotes" if plain is str and isinstance(value, (int, float)) else ""
        raise ConfigError(f"{place} must be {type_name(plain)}, not {shown(value)}{hint}")
    _check_texts(value, place)
    try:
        return float(value) if plain is float else value
    except OverflowError:  # a whole number beyond all floats is infinite, which no bounds allow
        return math.inf


def _options(value: Any, place: str) -> Any:
    """A part's own options: names with plain values, which the part itself checks."""
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))
        _check_texts(plain, place)
    except (TypeError, ValueError, RecursionError):  # ValueError: it is not finite, or holds itself
        plain = None
    if not isinstance(value, Mapping) or plain != value:
        raise ConfigError(f"{place} must be names with plain, finite values, not {shown(value)}")
    return plain


def _check_texts(value: Any, place: str) -> None:
    """Raises a ConfigError for a text, or one in lists and options, that is too long or not printable."""
    if isinstance(value, (list, dict)):
        for one in (*value, *(value.values() if isinstance(value, dict) else ())):
            _check_texts(one, place)
    if not isinstance(value, str):
        return
    if "${" in value or value == "???":  # what other config systems fill in
        raise ConfigError(f"{place} is {shown(value)}; write the text itself, nothing is filled in here")
    control = any(unicodedata.category(one) in ("Cc", "Cs") and one not in "\n\t" for one in value)
    if control or len(value) > MAX_TEXT:
        raise ConfigError(f"{place} is {shown(value)}; write a text of up to {MAX_TEXT} printable characters")


def _elsewhere(root: type, name: str) -> str:
    """A hint at the key of the same or a close last part anywhere in the schema."""
    full = {known.split(".")[-1]: known for known, _, _, _ in all_keys(root)}
    near = difflib.get_close_matches(name, full, n=1)
    return f"; did you mean '{full[near[0]]}'?" if near else ""
