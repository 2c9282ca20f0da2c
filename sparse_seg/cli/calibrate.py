"""Find the threshold that spends a budget over a whole data set: hard frames then get more fine blocks.

The policy of the config scores every block of the training frames; the share --fine-fraction of all of them
lies above the threshold. It is printed as settings, and --out writes a checkpoint that has them.

examples:
  sparse-seg calibrate configs/camvid_light.yaml camvid-slim --fine-fraction 0.15
  sparse-seg calibrate configs/camvid_light.yaml camvid-slim --split val --out light_budget.safetensors
"""

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

from sparse_seg.checkpoint import save
from sparse_seg.cli.arguments import fraction, option
from sparse_seg.cli.options import add_config, add_data, add_device, opened, output_file
from sparse_seg.evaluation.calibrate import calibrate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, checkpoint=True)
    option(parser, "--fine-fraction F", "share of all blocks", fraction, told="the config's")
    option(parser, "--out OUT", "checkpoint to write, .safetensors", output_file)
    add_data(parser, "train")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    config, loaded, model, dataset, *_ = opened(args, args.device, args.out)
    found = calibrate(model.for_inference(), dataset, config.data, args.limit)
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
        print(f"{args.out}: has these settings; run it without a config, whose mask would replace them")
    return 0
