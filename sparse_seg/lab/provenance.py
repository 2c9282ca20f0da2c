"""Where a figure comes from: kept in every result file."""

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparse_seg.files import atomic_write
from sparse_seg.version import __version__

NAME = "name = sparse_seg\n"  # in the checkout's setup.cfg


def provenance() -> dict[str, Any]:
    """Command, version, commit, machine, threads and date of this run."""
    return {
        "command": " ".join(
            ["sparse-seg" if "sparse" in Path(sys.argv[0]).name else sys.argv[0], *sys.argv[1:]]
        ),
        "version": __version__,
        "commit": _commit(),
        "machine": _machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def write_result(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file: where it comes from, and the content."""
    atomic_write(path, json.dumps(provenance() | dict(content), indent=1) + "\n")


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with `+` if files differ from it; None where it
    is installed, though its environment may lie in some other repository."""
    root = Path(__file__).parents[2]
    settings = root / "setup.cfg"
    if not (root / ".git").exists() or not settings.is_file() or NAME not in settings.read_text():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of a hook
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _machine() -> str:
    """The GPU's name if there is one, else the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()
