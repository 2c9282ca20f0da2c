"""Argument types that several tools share; argparse turns their errors into usage errors (exit code 2)."""

import argparse
import math
from collections.abc import Callable


def parse_size(text: str) -> tuple[int, int]:
    """`256x512` as (height, width) in pixels.

    Raises:
        argparse.ArgumentTypeError: not two positive whole numbers.
    """
    height, separator, width = text.lower().partition("x")
    if not (separator and height.isdecimal() and width.isdecimal() and int(height) > 0 and int(width) > 0):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size; write HEIGHTxWIDTH in pixels, as in 256x512"
        )
    return int(height), int(width)


def whole_number(lowest: int) -> Callable[[str], int]:
    """An argument type for whole numbers from `lowest`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest}")
        return int(text)

    return parse


def number(lowest: float, highest: float) -> Callable[[str], float]:
    """An argument type for numbers from `lowest` to `highest`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"must be a number from {lowest:g} to {highest:g}, not {text!r}")
        return value

    return parse


fraction = number(0, 1)
