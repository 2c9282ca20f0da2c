"""Find the threshold that spends a budget over a whole data set: hard frames then get more fine blocks.

The policy of the config scores every block of the training frames; the share --fine-fraction of all of them
lies above the threshold. It is printed as settings, and --out writes a checkpoint that has them.

examples:
  sparse-seg calibrate configs/camvid_light.yaml camvid-slim --fine-fraction 0.15
  sparse-seg calibrate configs/camvid_light.yaml camvid-slim --split val --out light_budget.safetensors
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

from sparse_seg.checkpoint import build_network, load, save
from sparse_seg.cli.arguments import fraction, whole_number
from sparse_seg.cli.options import add_config, add_device, input_files, output_file, overrides
from sparse_seg.config import check_classes, load_config
from sparse_seg.data import open_split
from sparse_seg.evaluation.calibrate import calibrate
from sparse_seg.files import check_outputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, checkpoint=True)
    parser.add_argument(
        "--fine-fraction", type=fraction, metavar="F", help="share of all blocks (default: the config's)"
    )
    parser.add_argument("--out", type=output_file, metavar="OUT", help="checkpoint to write, .safetensors")
    parser.add_argument("--split", default="train", help="split of the dataset (default: train)")
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="use the first N frames only")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, overrides(args))
    check_classes(config)
    loaded = load(args.checkpoint)
    model = build_network(loaded, config).to(args.device)
    dataset = open_split(config.data, args.split)
    if args.out:
        check_outputs([args.out], [*input_files(args.config, config, args.checkpoint), *dataset.files()])
    dataset.check(args.limit)
    found = calibrate(model.for_inference(), dataset, config.data, args.limit, progress=True)
    cuts: dict[str, Any] = {"threshold": found.threshold, "middle_threshold": found.middle_threshold}
    settings = " ".join(f"model.mask.{key}={value:.6g}" for key, value in cuts.items() if value is not None)
    least, mean, most = min(found.shares), statistics.mean(found.shares), max(found.shares)
    print(
        f"policy {model.policy.name}: {mean:.3f} of the blocks of {len(found.shares)} frames are fine, "
        f"{least:.3f} to {most:.3f} of a frame"
    )
    print(f"run it with --set {settings}")
    if args.out:
        mask = dataclasses.replace(config.model.mask, **cuts)
        network = dataclasses.replace(loaded.config, mask=mask, strides=list(model.strides))
        save(dataclasses.replace(loaded, path=Path(args.out), config=network))
        print(f"{args.out}: has these settings")
    return 0
