"""Train a network, dense or selective, from a YAML config.

examples:
  sparse-seg train configs/camvid_r18.yaml --set data.root=../camvid
  sparse-seg train configs/demo.yaml --work-dir runs/try --set train.lr=0.02 model.width=0.5
  sparse-seg train configs/camvid_r18.yaml --resume
  torchrun --nproc_per_node=4 tools/train.py configs/cityscapes_r50.yaml   (4 GPUs share each batch)
"""

import argparse
from pathlib import Path

from sparse_seg.cli.arguments import option
from sparse_seg.cli.options import add_config, add_device, input_files, output_folder
from sparse_seg.config import load_config
from sparse_seg.files import check_outputs
from sparse_seg.processes import joined_processes
from sparse_seg.training.checkpoint import best_of, run_files
from sparse_seg.training.stopping import AlreadyTrained
from sparse_seg.training.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    told = "runs/CONFIG's name"
    option(parser, "--work-dir D", "where the run is kept", output_folder, told=told)
    text = "resume from the run's last.pt, or from PATH"
    parser.add_argument("--resume", nargs="?", const=True, default=False, metavar="PATH", help=text)
    option(parser, "--amp", "mixed precision: short for --set train.amp=true", bool)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    overrides = [*args.set, "train.amp=true"] if args.amp else args.set
    work_dir = Path(args.work_dir or Path("runs") / Path(args.config).stem)
    with joined_processes(args.device) as (processes, device):
        config = load_config(args.config, overrides)
        others = [args.resume] if isinstance(args.resume, str) else []
        check_outputs(run_files(work_dir), input_files(args.config, config, *others))
        try:
            best = Trainer(config, work_dir, args.resume, device, processes).run()
            result = f"best validation mIoU {best:.4f}; weights in {best_of(work_dir)}"
        except AlreadyTrained as done:  # a success: a loop that restarts until exit code 0 ends
            result = str(done)
    if processes.is_first:
        print(result)
    return 0
