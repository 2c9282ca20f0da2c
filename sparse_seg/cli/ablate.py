"""Run an ablation: train what a grid needs, run it every way that the grid names, and report.

The grid is a YAML file (see configs/ablation/ and docs/ablation.md). A killed run resumes where it stopped,
finished cells are not done again, and several runs may share a work folder: start the same command for each
GPU, or one by torchrun, whose processes share each training and each evaluation. Writes results.json,
table.md, table.csv, plots and report.html.

examples:
  sparse-seg ablate configs/ablation/scenes.yaml --dry-run
  sparse-seg ablate configs/ablation/camvid.yaml --set data.root=../camvid
  sparse-seg ablate configs/ablation/cityscapes.yaml --checkpoint r101.safetensors --work-dir runs/r101
  for gpu in 0 1 2 3; do CUDA_VISIBLE_DEVICES=$gpu sparse-seg ablate configs/ablation/cityscapes.yaml & done
"""

import argparse
from pathlib import Path

from sparse_seg.cli.arguments import option
from sparse_seg.cli.options import CHECKPOINT, add_config, add_device, input_files, output_folder
from sparse_seg.errors import TrainingError
from sparse_seg.files import check_outputs
from sparse_seg.lab.ablation.costs import measure_costs, remaining
from sparse_seg.lab.ablation.grid import load_grid
from sparse_seg.lab.ablation.report import FILES, ablation_table, summarise, write_ablation
from sparse_seg.lab.ablation.runner import Ablation
from sparse_seg.lab.provenance import write_result
from sparse_seg.lab.report.tables import Column, Table
from sparse_seg.processes import joined_processes
from sparse_seg.training.checkpoint import run_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    text = "use it as the first network instead of training that"
    option(parser, "--checkpoint C", f"{text}; {CHECKPOINT}")
    told = "runs/ablation/CONFIG's name"
    option(parser, "--work-dir D", "where all is kept", output_folder, told=told)
    option(parser, "--dry-run", "list the remaining work, estimate its time, and stop", bool)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    work_dir = Path(args.work_dir or Path("runs/ablation") / Path(args.config).stem)
    grid = load_grid(args.config, args.set)
    with joined_processes(args.device) as (processes, device):
        ablation = Ablation(grid, work_dir, args.checkpoint, device, processes)
        check_outputs(_files(ablation), _read_files(ablation, args))
        if not args.dry_run:
            try:
                ablation.run()
            except KeyboardInterrupt:
                raise TrainingError("interrupted; run it again to resume") from None
    if not processes.is_first:
        return 0
    if args.dry_run:
        _print_remaining(ablation)
        return 0
    results = ablation.results()
    rows = summarise(ablation, results, measure_costs(ablation))
    commits = sorted({str(result["origin"]["commit"]) for result in results})
    content = {"title": ablation.grid.spec.title, "commits": commits, "rows": rows}
    write_result(work_dir / "results.json", content)
    write_ablation(ablation, rows)
    print(ablation_table(rows).to_text())
    print(f"report: {work_dir / 'report.html'}")
    return 0


def _files(ablation: Ablation) -> list[Path]:
    """What is written: tables, the report, and trainings that are yet to start."""
    trained = [name for name in ablation.grid.networks if name not in ablation.given]
    folders = [ablation.folder(name, seed) for name in trained for seed in ablation.grid.spec.seeds]
    files = [file for folder in folders for file in run_files(folder)]
    return [*(ablation.work_dir / name for name in ("results.json", *FILES)), *files]


def _read_files(ablation: Ablation, args: argparse.Namespace) -> list[Path]:
    """What is read: the grid, the networks' configs, and checkpoints."""
    grid = ablation.grid
    files = input_files(args.config, None, args.checkpoint)
    for name, network in grid.networks.items():
        own = None if network.config is None else Path(args.config).parent / network.config
        files += input_files(own, grid.configs[name])
    return files


def _print_remaining(ablation: Ablation) -> None:
    rows = remaining(ablation)
    shown = [
        {"what": row["what"], "state": "done" if row["done"] else f"about {_duration(row['seconds'])}"}
        for row in rows
    ]
    print(Table([Column("what", "what"), Column("state", "left")], shown).to_text())
    left = [row["seconds"] for row in rows if not row["done"]]
    total = f"about {_duration(sum(left))} for one process on {ablation.device}"
    print(
        f"{len(left)} of {len(rows)} left, {total}: an estimate by multiply-adds, and by logs where there are"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
