"""Time two networks on a CUDA device in every way there is: the tables of docs/performance.md.

A DeepLabV3-ResNet-50 and a light network run dense and selective, at two sizes, with one image and four, in
float32, TF32, float16 and bfloat16, by cuDNN, the gather, spconv and triton engines, the static form and CUDA
graphs, the latter on two streams, too; then by torch.compile and TensorRT, while time remains. First come the
cells that matter most, the first network's large images where tensor cores run; then the others, the cheapest
first. Written after each cell, so a run that is stopped keeps what it has. On a CPU it rehearses: tiny sizes,
no graphs.

example:
  sparse-seg gpu --json docs/results/gpu_h100.json --minutes 8
"""

import argparse
import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sparse_seg.cli.arguments import number, option, whole_number
from sparse_seg.cli.options import output_file
from sparse_seg.config import load_config
from sparse_seg.files import atomic_write, check_outputs
from sparse_seg.lab.benchmark.gpu import PRECISIONS, gpu_table, in_one_line, measure_gpu
from sparse_seg.lab.benchmark.measure import Subject
from sparse_seg.lab.provenance import write_result

NETWORKS = {
    "DeepLabV3-ResNet-50": ("bench_r50.yaml", 0.1, ["model.num_classes=19"]),
    "light": ("camvid_student_slim.yaml", 0.15, ["model.mask.policy=confidence"]),
}
BATCHES = (1, 4)
Key = tuple[str, tuple[int, int], int, str]  # a cell: network, size, batch, precision


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--json OUT", "result file; a table beside it", output_file, required=True)
    option(parser, "--minutes N", "start no new cell after these", number(0, 1e6), 8.0, told="8")
    option(parser, "--repeats N", "timings of each", whole_number(1), 10)
    option(parser, "--configs DIR", "where the networks' configs are", default="configs")


def run(args: argparse.Namespace) -> int:
    tables = Path(args.json).with_suffix(".md")
    check_outputs([args.json, tables], [Path(args.configs, name) for name, _, _ in NETWORKS.values()])
    cuda = torch.cuda.is_available()
    device, sizes = ("cuda", ((512, 1024), (1024, 2048))) if cuda else ("cpu", ((64, 96),))
    keys = by_weight(itertools.product(NETWORKS, sizes, BATCHES, PRECISIONS))
    cases = [(key, "") for key in keys]
    cases += [((name, sizes[-1], 1, "fp16"), ", compiled") for name in NETWORKS if cuda]
    cells: dict[Any, list[dict[str, Any]]] = {}
    end = time.monotonic() + 60 * args.minutes
    for done, (key, compiled) in enumerate(cases):
        if time.monotonic() > end:
            print(f"stopped after {args.minutes:g} minutes; not measured:")
            for left, more in cases[done:]:
                print(f"  {told(left)}{more}")
            break
        network, size, batch, precision = key
        name, fraction, settings = NETWORKS[network]
        dtype, tf32 = PRECISIONS[precision]
        config = load_config(Path(args.configs, name), settings)
        subject = Subject(config, None, size, batch, torch.device(device), dtype)
        try:
            found = measure_gpu(subject, tf32, fraction, args.repeats, bool(compiled))
        except Exception as error:  # whatever CUDA raises: other cells are measured all the same
            print(f"{told(key)}{compiled} not measured: {in_one_line(error)}")
            continue
        place = {"network": network, "size": list(size), "batch": batch, "precision": precision}
        cells[key] = [place | row for row in found]
        print(gpu_table([cells[key]]), flush=True)
        write_result(args.json, {"rows": list(itertools.chain(*cells.values()))})
        atomic_write(tables, gpu_table(list(cells.values())))
    return 0


def told(key: Key) -> str:
    network, size, batch, precision = key
    return f"{network}, {batch} x {size[0]}x{size[1]}, {precision}"


def by_weight(keys: Iterable[Key]) -> list[Key]:
    """Cells in the order in which they are measured, see the top of this file."""
    keys = list(keys)
    network, largest = keys[0][0], max(size for _, size, _, _ in keys)

    def rank(key: Key) -> tuple[bool, int]:
        matters = key[0] == network and key[1] == largest and key[3] != "fp32"
        return not matters, key[2] * key[1][0] * key[1][1]

    return sorted(keys, key=rank)
