"""Argument types that several tools share; argparse turns their errors into usage errors (exit code 2)."""

import argparse
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
