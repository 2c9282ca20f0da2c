"""Errors whose message is meant for the person at the command line: what is wrong and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseSegError(Exception):
    """Base of the errors below. The command line prints the message alone and exits with code 1."""


class ConfigError(SparseSegError):
    """A config file or `--set` override has an unknown key, a wrong type or an impossible value."""


class DataError(SparseSegError):
    """A dataset is incomplete or inconsistent; the message names the file."""


class MeasurementError(SparseSegError):
    """Time or memory cannot be measured: a run failed, or the machine does not tell."""


class CheckpointError(SparseSegError):
    """A checkpoint is missing, corrupt or does not fit the model."""


class TrainingError(SparseSegError):
    """Training cannot go on (for instance a loss that is not finite)."""


def did_you_mean(key: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest valid one, or nothing."""
    valid = list(valid)
    near = difflib.get_close_matches(key, valid, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return ""


def choose_one(value: object, valid: Iterable[object]) -> str:
    """The end of a message about a value that is none of the valid ones: itself, the nearest and all."""
    names = [str(one) for one in valid]
    near = did_you_mean(str(value), names)
    return f"{shown(value)}{f'{near} Choose' if near else '; choose'} one of {', '.join(names)}"


def shown(value: object) -> str:
    """A value in a message: its `repr` on one line, cut short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of over 4300 digits; a deep nest
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."
