"""Measure a checkpoint on a dataset: mIoU, per-class IoU, pixel accuracy, boundary mIoU, speed.

The network runs selective, with the config's mask policy, unless --dense names an output stride. With
--compare, the same weights run dense OS8, dense OS16, and selective with each of --policies at each of the
given fine fractions; the table then has multiply-adds and milliseconds too.

examples:
  sparse-seg evaluate configs/camvid_r18.yaml runs/camvid_r18/best.pt --fine-fraction 0.2
  sparse-seg evaluate configs/camvid_r18.yaml runs/camvid_r18/best.pt --dense 8 --json dense8.json
  sparse-seg evaluate configs/camvid_r18.yaml runs/camvid_r18/best.pt --set model.mask.policy=oracle
  sparse-seg evaluate configs/converted.yaml r101.safetensors --set data.root=../cityscapes
  sparse-seg evaluate configs/camvid_r18.yaml runs/camvid_r18/best.pt --compare 0.1 0.2 --report r.html
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from sparse_seg.cli.arguments import whole_number
from sparse_seg.cli.options import add_config, add_device, add_network, fraction, output_file, overrides
from sparse_seg.config import check_classes, load_config
from sparse_seg.conversion.converted import is_safetensors
from sparse_seg.conversion.loading import run_config
from sparse_seg.data import build_dataset
from sparse_seg.evaluation.comparison import compare, settings
from sparse_seg.evaluation.evaluate import evaluate
from sparse_seg.evaluation.provenance import provenance
from sparse_seg.files import atomic_write
from sparse_seg.masks import POLICIES
from sparse_seg.reporting.comparison import comparison_table, write_comparison
from sparse_seg.reporting.summary import class_table, summary
from sparse_seg.schema import Config
from sparse_seg.training.checkpoint import load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a training run, or a converted file"
    )
    add_network(parser).add_argument(
        "--compare", nargs="+", type=fraction, metavar="F", help="compare at these fine fractions"
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        choices=sorted(set(POLICIES) - {"uniform"}),
        help="with --compare: mask policies to compare (default: edge oracle)",
    )
    parser.add_argument(
        "--report", type=output_file, metavar="OUT", help="with --compare: also write an HTML report"
    )
    parser.add_argument("--split", default="val", help="split of the dataset (default: val)")
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="measure the first N images only")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="also write the result to this file")
    add_device(parser)
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    for option in ("policies", "report"):
        if getattr(args, option) is not None and args.compare is None:
            args.usage_error(f"argument --{option}: only with --compare; add --compare F")
    config = load_config(args.config, overrides(args))
    if args.compare:
        compare_and_report(
            config,
            args.checkpoint,
            args.policies or ["edge", "oracle"],
            args.compare,
            args.split,
            args.limit,
            args.device,
            args.json,
            args.report,
        )
        return 0
    check_classes(config)
    dataset = build_dataset(config.data.dataset, config.data.root, args.split)
    dataset.check()
    model = load_model(args.checkpoint, config).to(args.device)
    result = evaluate(model, dataset, config.data, args.dense, limit=args.limit, progress=True)
    print(class_table(result, dataset.classes).to_text())
    print(summary(result))
    if args.json:
        content = provenance() | {"classes": dataset.classes.names, "result": result.as_dict()}
        atomic_write(args.json, json.dumps(content, indent=1) + "\n")
    return 0


def compare_and_report(
    config: Config,
    checkpoint: str | Path,
    policies: Sequence[str],
    fractions: Sequence[float],
    split: str = "val",
    limit: int | None = None,
    device: torch.device | str = "cpu",
    json_path: str | Path | None = None,
    report_path: str | Path | None = None,
) -> None:
    """Compare the ways to run a checkpoint, print the table, and write the files asked for."""
    check_classes(config)
    dataset = build_dataset(config.data.dataset, config.data.root, split)
    dataset.check()
    model = load_model(checkpoint, config).to(device)
    ways = settings(policies, fractions)
    rows = compare(model, dataset, config.data, ways, limit, progress=True)
    print(comparison_table(rows).to_text())
    origin = provenance()
    if json_path:
        atomic_write(json_path, json.dumps(origin | {"rows": rows}, indent=1) + "\n")
    if report_path:
        config = run_config(checkpoint, config) if is_safetensors(checkpoint) else config
        description = (
            f"{checkpoint}: {config.model.backbone} x{config.model.width:g}, {config.model.head} head, on "
            f"{rows[0]['images']} images of {config.data.dataset} {split}. "
            "One set of weights, no retraining. "
            f"{origin['machine']}, {origin['threads']} threads; milliseconds are medians over the images."
        )
        shown = [ways[0], ways[1], ways[2 + len(fractions) // 2]]  # the first policy at a middle fraction
        write_comparison(
            report_path, "Dense and selective", description, rows, model, dataset, config.data, shown
        )
        print(f"report: {report_path}")
