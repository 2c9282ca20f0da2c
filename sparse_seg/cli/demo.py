"""The main job in one command, on synthetic scenes: 5 to 8 minutes on 2 idle cores.

Makes scenes, trains a small dense network at output stride 8, then runs the same weights dense (OS8, OS16)
and selective (policy confidence) at several fine fractions, without retraining, on one thread (of several,
this small network leaves each too little to do). Prints a table and writes report.html, report.png,
comparison.json and one segmented picture. An interrupted demo resumes where it stopped.

example:
  sparse-seg demo --out runs/demo
"""

import argparse
from pathlib import Path

import torch

import sparse_seg
from sparse_seg.cli.arguments import option, whole_number
from sparse_seg.cli.options import add_device, add_set, input_files, output_folder
from sparse_seg.config import Config, load_config
from sparse_seg.data.scenes import write_scenes
from sparse_seg.errors import ConfigError, TrainingError
from sparse_seg.files import check_outputs
from sparse_seg.lab.compare.report import compare_and_report
from sparse_seg.lab.compare.run import comparison_ways
from sparse_seg.lab.opened import open_checkpoint
from sparse_seg.lab.report.overlays import write_image
from sparse_seg.training.checkpoint import run_files
from sparse_seg.training.finish import finish_training

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "--out D", "folder to work in", output_folder, "runs/demo")
    option(parser, "--config CONFIG", "YAML config", told="configs/demo.yaml of the checkout")
    option(parser, "--count", "scenes to make", whole_number(10), 250)
    add_set(parser, "override config keys")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    config = load_config(args.config or _default_config(), args.set)
    files = [out / name for name in ("comparison.json", "report.html", "report.png", "picture.png")]
    check_outputs([*files, *run_files(out / "training")], input_files(args.config, config))
    config.data.root = str(out / "scenes")  # not by an override: a path need not be valid YAML
    try:
        _run(out, config, args)
    except KeyboardInterrupt:
        raise TrainingError("interrupted; run it again to resume") from None
    return 0


def _run(out: Path, config: Config, args: argparse.Namespace) -> None:
    print(f"demo: 5 to 8 minutes on 2 idle cores, most of it training; all goes to {out}", flush=True)
    write_scenes(out / "scenes", args.count)
    checkpoint = finish_training(config, out / "training", args.device)
    subject = open_checkpoint(config, checkpoint, args.device)
    torch.set_num_threads(1)
    ways = comparison_ways(subject.model, ["confidence"], FRACTIONS)
    compare_and_report(subject, ways, out / "comparison.json", out / "report.html")
    scene = min((out / "scenes/leftImg8bit/val").rglob("*.png"))
    found = sparse_seg.segment(checkpoint, scene)
    write_image(out / "picture.png", found.overlay())
    print(f"picture: {out / 'picture.png'}, {found}")
    print("a photo of a street: sparse-seg predict street-lite0 PHOTO --out runs/pictures")


def _default_config() -> Path:
    path = Path(sparse_seg.__file__).parents[1] / "configs/demo.yaml"
    if not path.is_file():
        raise ConfigError(f"{path} is not there: run from a checkout of the repository, or add --config FILE")
    return path
