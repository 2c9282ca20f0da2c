"""The command line: `sparse-seg COMMAND ...`, `python -m sparse_seg COMMAND ...` and `tools/COMMAND.py ...`.

Each command is a module here with `add_arguments(parser)` and `run(args)`; its docstring is its help.
"""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_seg.cli.arguments import Parser
from sparse_seg.errors import SparseSegError, printable
from sparse_seg.version import __version__

COMMANDS = (
    *("train", "evaluate", "ablate", "predict", "browse", "make_scenes", "demo"),
    *("benchmark", "gpu", "convert", "fit_gain", "calibrate", "export"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 1 failed (one line says why), 2 bad usage."""
    _open_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0].replace("-", "_") if arguments else ""
    if command not in COMMANDS:
        return _overview(arguments)
    module = importlib.import_module(f"{__name__}.{command}")
    parser = Parser(
        prog=f"sparse-seg {command.replace('_', '-')}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.set_defaults(usage_error=parser.error)  # for options that exclude each other
    try:
        return module.run(parser.parse_args(arguments[1:]))
    except SparseSegError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(printable(f"error: {where}{error.strerror or error}"), file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
    return 1


def _overview(arguments: list[str]) -> int:
    """Help, version, or the complaint about an unknown command."""
    listed = "\n".join(f"  {name.replace('_', '-'):<12} {_purpose(name)}" for name in COMMANDS)
    parser = Parser(
        prog="sparse-seg",
        description="Semantic segmentation that pays for detail only where detail is.",
        epilog=f"commands:\n{listed}\n\nsparse-seg COMMAND --help tells more, with examples",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sparse_seg {__version__}")
    parser.add_argument(
        "command",
        choices=[name.replace("_", "-") for name in COMMANDS],
        metavar="COMMAND",
        help="one of those below",
    )
    parser.parse_args(arguments)
    return 2


def _purpose(command: str) -> str:
    """The first line of a command's docstring, read from its file: to import all takes seconds."""
    source = Path(__file__).with_name(f"{command}.py").read_text(encoding="utf-8")
    return source.partition('"""')[2].partition("\n")[0]


def _open_streams() -> None:
    """Let everything print: a closed stream, as some schedulers start a job with, swallows it, and a terminal
    shows `?` for letters that it does not know."""
    for _ in range(3):  # descriptors 0 to 2, lest the next file that is opened becomes one
        number = os.open(os.devnull, os.O_RDWR)
        if number > 2:
            os.close(number)
            break
        os.set_inheritable(number, True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="replace")
