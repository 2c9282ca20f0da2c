"""Time two networks on a CUDA device in every way there is: the tables of docs/performance.md.

A DeepLabV3-ResNet-50 and a light network run dense and selective, at two sizes, with one image and four, in
float32, TF32 and float16, by cuDNN, the gather and spconv engines, the static form and CUDA graphs; then by
torch.compile, while time remains. Written after each cell, so a run that is stopped keeps what it has.
On a CPU it rehearses: tiny sizes, no graphs.

example:
  sparse-seg gpu --json docs/results/gpu_h100.json --minutes 8
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from sparse_seg.cli.options import output_file
from sparse_seg.config import load_config
from sparse_seg.files import atomic_write
from sparse_seg.lab.benchmark.gpu import PRECISIONS, Deadline, measure_gpu, table
from sparse_seg.lab.benchmark.subject import Setup
from sparse_seg.lab.provenance import provenance

NETWORKS = {
    "DeepLabV3-ResNet-50": ("bench_r50.yaml", 0.1, ["model.num_classes=19"]),
    "light": ("camvid_slim.yaml", 0.15, ["model.mask.policy=confidence"]),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", type=output_file, required=True, metavar="OUT", help="result file; a table beside it"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="start no new cell after these (default: 8)"
    )
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="default: 10")
    parser.add_argument("--configs", default="configs", metavar="DIR", help="where the networks' configs are")


def run(args: argparse.Namespace) -> int:
    cuda = torch.cuda.is_available()
    sizes = ((512, 1024), (1024, 2048)) if cuda else ((64, 96),)
    deadline, rows = Deadline(args.minutes), list[dict[str, Any]]()
    cells = [(*cell, False) for cell in itertools.product(NETWORKS, sizes, (1, 4), PRECISIONS)]
    cells += [(name, sizes[-1], 1, "fp16", True) for name in NETWORKS if cuda]
    for name, size, batch, precision, compiled in cells:
        if deadline.is_over:
            print(f"stopped after {args.minutes:g} minutes: {len(cells)} cells were asked for")
            break
        config, fraction, settings = NETWORKS[name]
        setup = Setup(
            load_config(Path(args.configs, config), settings),
            None,
            size,
            batch,
            "cuda" if cuda else "cpu",
            precision,
        )
        found = measure_gpu(setup, fraction, args.repeats, compiled)
        rows = [row for row in rows if compiled is False or not _same(row, name, size, batch, precision)]
        rows += [{"network": name} | row for row in found]
        _write(Path(args.json), rows)
        print(table(rows[-len(found) :]), flush=True)
    return 0


def _same(row: dict[str, Any], *cell: Any) -> bool:
    return (row["network"], tuple(row["size"]), row["batch"], row["precision"]) == cell


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    atomic_write(path, json.dumps(provenance() | {"rows": rows}, indent=1) + "\n")
    atomic_write(path.with_suffix(".md"), table(rows))
