"""Errors whose message is meant for the person at the command line: what is wrong and how to fix it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from typing import Any


def printable(text: str) -> str:
    """`text` on one line, with control characters (as escape codes in names from files) spelt out."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )


class SparseSegError(Exception):
    """Base of the errors below. The command line prints the message alone and exits with code 1."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(SparseSegError):
    """A config file or `--set` override has an unknown key, a wrong type or an impossible value."""


class DataError(SparseSegError):
    """A dataset is incomplete or inconsistent; the message names the file."""


class MeasurementError(SparseSegError):
    """Time or memory cannot be measured: a run failed, or the machine does not tell."""


class CheckpointError(SparseSegError):
    """A checkpoint is missing, corrupt or does not fit the model."""


class TrainingError(SparseSegError):
    """Training cannot continue (for instance because the loss is not finite)."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory, on GPU or CPU."""
    told = any(text in str(error) for text in ("out of memory", "can't allocate memory"))
    return told or isinstance(error, MemoryError)


def import_package(name: str, missing: str, *needs: str) -> Any:
    """An optional package, or a module of one.

    Args:
        missing: the error where it is not installed: what needs it and how to install it.
        needs: attributes that are used; a folder that happens to have the package's name has none.

    Raises:
        SparseSegError: it is not installed, or broken: importing it fails, or it has not what is used.
    """
    package = name.partition(".")[0]
    try:
        module = importlib.import_module(name)
        for attribute in needs:
            getattr(module, attribute)
        return module
    except Exception as error:  # whatever a broken package raises
        if isinstance(error, ModuleNotFoundError) and error.name in (package, name):
            raise SparseSegError(missing) from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise SparseSegError(f"the package {package} is broken ({reason}); install it again")


def did_you_mean(key: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest valid one, or nothing.

    What all names share (`--` of options, `train.` in keys, `.yaml` in files) is not counted as likeness.
    """
    valid = list(valid)
    parts = [name.lstrip("-").split(".") for name in (key, *valid)]
    for end in (0, -1):
        while min(map(len, parts)) > 1 and len({part[end] for part in parts}) == 1:
            parts = [part[1:] if end == 0 else part[:-1] for part in parts]
    short, *others = (".".join(part) for part in parts)
    names = dict(zip(others, valid, strict=True))
    near = difflib.get_close_matches(short, names, n=1)
    return f"; did you mean '{names[near[0]]}'?" if near else ""


def choose_one(value: object, valid: Iterable[object]) -> str:
    """The end of a message about a value that is none of the valid ones: itself, the nearest and all."""
    names = [str(one) for one in valid]
    near = did_you_mean(str(value), names)
    return f"{shown(value)}{f'{near} Choose' if near else '; choose'} one of {', '.join(names)}"


def and_more(faults: Sequence[str], what: str = "more") -> str:
    """The first of some faults or names, and how many there are beside it."""
    return faults[0] + (f" (and {len(faults) - 1} {what})" if len(faults) > 1 else "")


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, in a message of ours; its type, where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def shown(value: object) -> str:
    """A value in a message: its `repr` on one line, cut short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of over 4300 digits; a deep nest
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."
