"""Measure a checkpoint on a dataset: mIoU, per-class IoU, pixel accuracy, boundary mIoU, speed.

The network runs selective, with the config's mask policy, unless --dense names an output stride.

examples:
  sparse-seg evaluate configs/camvid_r18.yaml runs/camvid_r18/best.pt --fine-fraction 0.2
  sparse-seg evaluate configs/camvid_r18.yaml runs/camvid_r18/best.pt --dense 8 --json dense8.json
  sparse-seg evaluate configs/camvid_r18.yaml runs/camvid_r18/best.pt --set model.mask.policy=oracle
"""

from __future__ import annotations

import argparse
import json

from ..config import load_config
from ..data import build_dataset
from ..evaluation.evaluate import evaluate
from ..files import atomic_write
from ..reporting.summary import class_table, summary
from ..training.checkpoint import build_trained
from .options import add_config, add_device, add_network, overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a training run")
    add_network(parser)
    parser.add_argument("--split", default="val", help="split of the dataset (default: val)")
    parser.add_argument("--limit", type=int, metavar="N", help="measure the first N images only")
    parser.add_argument("--json", metavar="OUT", help="also write the result to this file")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, overrides(args))
    dataset = build_dataset(config.data.dataset, config.data.root, args.split)
    dataset.check()
    model = build_trained(config, args.checkpoint).to(args.device)
    result = evaluate(model, dataset, config.data, args.dense, limit=args.limit, progress=True)
    print(class_table(result, dataset.classes).to_text())
    print(summary(result))
    if args.json:
        atomic_write(args.json, json.dumps(result.as_dict() | {"classes": dataset.classes.names}, indent=1))
    return 0
