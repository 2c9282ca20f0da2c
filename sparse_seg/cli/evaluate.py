"""Measure a checkpoint on a dataset: mIoU, per-class IoU, pixel accuracy, boundary mIoU, speed.

The network runs selective, with the config's mask policy, unless --dense names an output stride. With
--compare, the same weights run dense at each of model.strides, and selective with each of --policies at each
of the given fine fractions; the table then has multiply-adds and milliseconds too, all of one runtime (auto:
onnxruntime on the CPU, if it can run every row). A policy may have options:
edge:cad, confidence:entropy,max,neighbours. Bounds for other masks are oracle (label boundaries),
oracle:change (what the dense network changes) and oracle:gain (where it is right and the coarse one wrong);
neither multiply-adds nor time of the last two's dense passes are counted.
An interrupted comparison can be resumed: --resume keeps the rows that are in the --json file and
measures policy by policy (times are then not of one run). Started by torchrun, processes share the images.

examples:
  sparse-seg evaluate configs/camvid_r18.yaml runs/camvid_r18/best.pt --fine-fraction 0.2
  sparse-seg evaluate configs/camvid_r18.yaml runs/camvid_r18/best.pt --dense 8 --json dense8.json
  sparse-seg evaluate configs/camvid_r18.yaml runs/camvid_r18/best.pt --set model.mask.policy=oracle
  torchrun --nproc_per_node=4 tools/evaluate.py configs/camvid_r18.yaml runs/camvid_r18/best.pt
  sparse-seg evaluate configs/converted.yaml r101.safetensors --set data.root=../cityscapes
  sparse-seg evaluate configs/camvid_r18.yaml runs/camvid_r18/best.pt --compare 0.1 0.2 --report r.html
  sparse-seg evaluate configs/camvid_r18.yaml runs/camvid_r18/best.pt --compare 0.1 0.2 --json masks.json \\
    --policies random edge edge:cad confidence oracle --exchange linear nearest --resume
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparse_seg.checkpoint import build_network, load, load_model, network_settings
from sparse_seg.cli.arguments import fraction, whole_number
from sparse_seg.cli.options import (
    add_config,
    add_device,
    add_network,
    add_runtime,
    add_views,
    input_files,
    output_file,
    overrides,
    policy,
    views,
)
from sparse_seg.config import Config, ModelConfig, check_classes, load_config
from sparse_seg.config.keys import choices
from sparse_seg.data import open_split
from sparse_seg.errors import ConfigError
from sparse_seg.evaluation.evaluate import evaluate
from sparse_seg.evaluation.views import ONCE
from sparse_seg.export.runner import AUTO, TORCH, Runner
from sparse_seg.export.runtime import RUNTIMES
from sparse_seg.files import atomic_write, check_outputs
from sparse_seg.lab.compare.report import comparison_table, write_comparison
from sparse_seg.lab.compare.run import compare, comparison_runtime, comparison_ways, groups
from sparse_seg.lab.provenance import provenance
from sparse_seg.lab.report.summary import class_table, summary
from sparse_seg.masks import POLICIES
from sparse_seg.processes import Processes, joined_processes
from sparse_seg.run.way import Way


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, checkpoint=True)
    add_network(parser).add_argument(
        "--compare", nargs="+", type=fraction, metavar="F", help="compare at these fine fractions"
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        type=policy,
        metavar="P",
        help=f"with --compare: of {', '.join(POLICIES)}, with options (default: edge oracle)",
    )
    parser.add_argument(
        "--exchange",
        nargs="+",
        choices=choices(ModelConfig, "exchange"),
        help="with --compare: rules to compare (default: the model's)",
    )
    parser.add_argument(
        "--merge",
        nargs="+",
        choices=choices(ModelConfig, "merge"),
        help="with --compare: ways to merge the levels to compare (default: the model's)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="with --compare: keep the rows that the --json file holds"
    )
    parser.add_argument(
        "--accuracy-only",
        action="store_true",
        help="with --compare: measure no time, and share the coarse pass between masks: several times faster",
    )
    parser.add_argument(
        "--report", type=output_file, metavar="OUT", help="with --compare: also write an HTML report"
    )
    parser.add_argument("--split", default="val", help="split of the dataset (default: val)")
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="measure the first N images only")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="also write the result to this file")
    add_views(parser)
    add_runtime(parser)
    add_device(parser)
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    for option in ("policies", "exchange", "merge", "report", "resume", "accuracy-only"):
        if getattr(args, option.replace("-", "_")) not in (None, False) and args.compare is None:
            args.usage_error(f"argument --{option}: only with --compare; add --compare F")
    if args.compare and views(args) != ONCE:
        args.usage_error("argument --compare: not with --flip, --scales or --window")
    if args.accuracy_only and args.runtime in RUNTIMES:
        args.usage_error("argument --runtime: not with --accuracy-only, which shares passes in torch")
    if args.resume and not args.json:
        args.usage_error("argument --resume: name the file to resume; add --json OUT")
    config = load_config(args.config, overrides(args))
    check_outputs(_written(args.json, args.report), input_files(args.config, config, args.checkpoint))
    with joined_processes(args.device) as (processes, device):
        if args.compare is None:
            _evaluate(config, args, processes, device)
            return 0
        if processes.count > 1:
            raise ConfigError("--compare measures time, which takes one process: run it without torchrun")
        compare_and_report(
            config,
            args.checkpoint,
            args.policies or ["edge", "oracle"],
            args.compare,
            args.split,
            args.limit,
            device,
            args.json,
            args.report,
            args.exchange or (),
            args.resume,
            not args.accuracy_only,
            args.merge or (),
            TORCH if args.accuracy_only else args.runtime,
        )
    return 0


def _evaluate(config: Config, args: argparse.Namespace, processes: Processes, device: torch.device) -> None:
    """Evaluate one way; processes share the frames, and the first one prints."""
    check_classes(config)
    model = load_model(args.checkpoint, config).to(device)
    dataset = open_split(config.data, args.split)
    check_outputs(_written(args.json), dataset.files())
    dataset.check(args.limit)
    way, looks = Way(args.dense), views(args)
    refusal = "processes share the images" if processes.count > 1 else None  # results must not depend on it
    runner = Runner(model, args.runtime, way, refusal)
    result = evaluate(model, dataset, config.data, way, args.limit, True, looks, processes, runner)
    if not processes.is_first:
        return
    print(class_table(result, dataset.classes).to_text())
    print(summary(result))
    print(runner.report())
    if args.json:
        content = provenance() | {"runtime": list(runner.runs)}
        content |= {"classes": dataset.classes.names, "result": result.as_dict()}
        atomic_write(args.json, json.dumps(content, indent=1) + "\n")


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
    exchanges: Sequence[str] = (),
    resume: bool = False,
    timed: bool = True,
    merges: Sequence[str] = (),
    runtime: str = AUTO,
) -> None:
    """Compare the ways to run a checkpoint, print the table, and write the files asked for."""
    check_classes(config)
    loaded = load(checkpoint)
    model = build_network(loaded, config).to(device)
    dataset = open_split(config.data, split)
    check_outputs(_written(json_path, report_path), dataset.files())
    dataset.check(limit)
    ways = comparison_ways(model, policies, fractions, exchanges, merges)
    fast, reason = comparison_runtime(model, dataset, config.data, ways, runtime)
    origin, rows = provenance() | {"runtime": fast.runtime if fast else TORCH}, list[dict[str, Any]]()
    subject = [config.data.dataset, str(Path(config.data.root).resolve()), split, limit, list(model.strides)]
    subject += filter(None, [config.data.bits, fast.runtime if fast else None])
    digest = hashlib.blake2b(loaded.path.read_bytes() + json.dumps(subject).encode(), digest_size=16)
    origin["subject"] = digest.hexdigest()
    if resume:
        earlier = _earlier(json_path, origin["subject"])
        rows = earlier["rows"]
        origin["commits"] = sorted({*earlier["commits"], str(origin["commit"])})  # of all runs that measured
    known = {row["network"] for row in rows}
    for part in groups([way for way in ways if way.name not in known]) if resume else [ways]:
        rows += compare(model, dataset, config.data, part, limit, progress=True, timed=timed, fast=fast)
        if json_path:
            atomic_write(json_path, json.dumps(origin | {"rows": rows}, indent=1) + "\n")
    print(comparison_table(rows).to_text())
    print(f"runtime: {origin['runtime']}" + (f" ({reason})" if reason else ""))
    if report_path:
        own = network_settings(loaded, config)
        description = (
            f"{checkpoint}: {own.module or f'{own.backbone} x{own.width:g}, {own.head} head'}, on "
            f"{rows[0]['images']} images of {config.data.dataset} {split}. "
            "One set of weights, no retraining. "
            f"{origin['machine']}, {origin['threads']} threads; milliseconds are medians over the images, in "
            f"{origin['runtime']}."
        )
        write_comparison(
            report_path, "Dense and selective", description, rows, model, dataset, config.data, ways, limit
        )
        print(f"report: {report_path}")


def _written(json_path: str | Path | None, report_path: str | Path | None = None) -> list[Path]:
    """The files asked for; a report has a picture beside it."""
    pages = [Path(report_path), Path(report_path).with_suffix(".png")] if report_path else []
    return [Path(json_path), *pages] if json_path else pages


def _earlier(path: str | Path | None, subject: str) -> dict[str, Any]:
    """The rows of an earlier comparison and the commits they are of; none if there is no such file.

    Raises:
        ConfigError: the file holds something else, or rows of other weights, images, strides or runtime.
    """
    assert path is not None
    if not Path(path).exists():
        return {"rows": [], "commits": []}
    try:
        found = json.loads(Path(path).read_text())
        rows = [row for row in found["rows"] if row["network"]]
        commits, earlier = found.get("commits", [str(found["commit"])]), found.get("subject", subject)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} holds no comparison to resume; remove it or name another file") from None
    if earlier != subject:
        raise ConfigError(
            f"{path} holds rows of other weights, images or strides, or of another runtime; name another "
            "--json file"
        )
    return {"rows": rows, "commits": commits}
