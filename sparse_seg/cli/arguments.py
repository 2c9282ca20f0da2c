"""A parser that suggests what was meant, and argument types; their errors are usage errors (exit code 2)."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

from sparse_seg.errors import choose_one, did_you_mean


class Parser(argparse.ArgumentParser):
    """Argparse's, with the nearest valid name for a misspelt option, choice or command."""

    def parse_known_args(  # type: ignore[override]  # of its overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Names an unknown option first: argparse would name the required ones that are then missing."""
        for text in args or ():
            if text == "--":
                break
            name = text.partition("=")[0]
            if _is_option(name) and name not in self._option_string_actions:
                near = did_you_mean(name, self._option_string_actions)
                self.error(f"unrecognized arguments: {name}{near}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Argparse's hook for `choices`."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"invalid choice: {choose_one(value, action.choices)}")


def _is_option(text: str) -> bool:
    """Whether argparse takes it for an option's name: not for a value, such as a negative number."""
    return text[:1] == "-" and text[1:2].strip("0123456789. ") != "" and " " not in text


def option(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    spelt: str,
    text: str,
    kind: Callable[[str], Any] = str,
    default: Any = None,
    told: str | None = None,
    **more: Any,
) -> None:
    """Add an argument.

    Args:
        spelt: as in `--batch N`: the name, and what stands for the value in the help.
        kind: converts the value; bool for a switch, which has none.
        told: the default in the help, where it is not told as it is.
        more: see `ArgumentParser.add_argument`.
    """
    name, _, metavar = spelt.partition(" ")
    if told or default is not None:
        text += f" (default: {told or default})"
    if metavar:
        more["metavar"] = metavar
    kept = {"action": "store_true"} if kind is bool else {"type": kind, "default": default}
    parser.add_argument(name, help=text, **kept, **more)


def size(lowest: int = 1) -> Callable[[str], tuple[int, int]]:
    """An argument type: `256x512` as (height, width), px, both at least `lowest`."""

    def parse(text: str) -> tuple[int, int]:
        height, separator, width = text.lower().partition("x")
        if not (separator and height.isdecimal() and width.isdecimal() and int(height) > 0 < int(width)):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a size; write HEIGHTxWIDTH in pixels, as in 256x512"
            )
        if min(int(height), int(width)) < lowest:
            raise argparse.ArgumentTypeError(f"{text!r}: both sides must be at least {lowest} px")
        return int(height), int(width)

    return parse


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
