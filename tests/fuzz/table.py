"""Run all fuzzing with its fixed seeds and write the results: `python -m tests.fuzz.table`.

Writes `docs/results/fuzz.json` and prints the table of docs/reliability.md. Takes some minutes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from sparse_seg.files import atomic_write
from sparse_seg.lab.provenance import provenance
from sparse_seg.lab.report.tables import Column, Table
from tests.fuzz import test_checkpoints, test_configs, test_images

RESULT = Path(__file__).parents[2] / "docs/results/fuzz.json"
OUTCOMES = ("tried", "right", "refused", "traceback", "wrong", "without_checksum")
TITLES = ("tried", "right", "refused in one line", "traceback", "wrong", "cannot be told")


def measure() -> list[dict[str, Any]]:
    """A row per kind of file: how many were tried, and how many came out how."""
    rows = []
    for name, kind in test_checkpoints.KINDS.items():
        rows.append({"what": name} | test_checkpoints.run(name, 0, kind.files))
        print(rows[-1], file=sys.stderr)
    rows.append({"what": "damaged images and labels"} | test_images.run(0, 400))
    rows.append({"what": "damaged and random configs"} | test_configs.run(0, 600))
    return [dict.fromkeys(OUTCOMES, 0) | row for row in rows]


def to_markdown(rows: list[dict[str, Any]]) -> str:
    columns = [Column(key, title, "{}") for key, title in zip(OUTCOMES, TITLES, strict=True)]
    return Table([Column("what", "what"), *columns], rows).to_markdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = provenance() | {"command": "python -m tests.fuzz.table", "rows": measure()}
    atomic_write(RESULT, json.dumps(result, indent=1) + "\n")
    print(to_markdown(result["rows"]))
