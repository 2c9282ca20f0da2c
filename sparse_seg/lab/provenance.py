"""Where a figure comes from: kept in every result file."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sparse_seg.version import __version__


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


def _commit() -> str | None:
    """The repository's commit, with `+` if files differ from it; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


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
