"""What a long job shows while it runs: a bar on a terminal; elsewhere nothing that returns the carriage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

_T = TypeVar("_T")


def bar(
    items: Iterable[_T], what: str, total: int | None = None, shown: bool = True, unit: str = "image"
) -> tqdm[_T]:
    """The items, counted by a bar that is gone when they end."""
    hidden = None if shown else True  # None: where there is no terminal
    return tqdm(items, what, total, disable=hidden, unit=unit, leave=False, dynamic_ncols=True)


def say(text: str) -> None:
    """Print a line at once, above a bar if there is one."""
    tqdm.write(text)
