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

import argparse

from sparse_seg.cli.arguments import fraction, option
from sparse_seg.cli.options import (
    add_config,
    add_data,
    add_device,
    add_json,
    add_network,
    add_runtime,
    add_views,
    check_dense,
    opened,
    output_file,
    policy,
    views,
)
from sparse_seg.config import ModelConfig
from sparse_seg.config.keys import choices
from sparse_seg.errors import ConfigError
from sparse_seg.evaluation.evaluate import evaluate
from sparse_seg.evaluation.views import ONCE
from sparse_seg.export.runner import AUTO, TORCH, Runner
from sparse_seg.lab.compare.report import compare_and_report, written
from sparse_seg.lab.compare.run import comparison_ways
from sparse_seg.lab.opened import Opened
from sparse_seg.lab.provenance import write_result
from sparse_seg.lab.report.tables import Column, Table
from sparse_seg.masks import POLICIES
from sparse_seg.processes import Processes, joined_processes
from sparse_seg.run.way import Way


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, checkpoint=True)
    group = add_network(parser)
    option(group, "--compare F", "compare at these fine fractions", fraction, nargs="+")
    text = f"with --compare: of {', '.join(POLICIES)}, with options"
    option(parser, "--policies P", text, policy, told="edge oracle", nargs="+")
    for name, text in (("exchange", "rules to compare"), ("merge", "ways to merge the levels to compare")):
        known = choices(ModelConfig, name)
        option(parser, f"--{name}", f"with --compare: {text}", told="the model's", nargs="+", choices=known)
    option(parser, "--resume", "with --compare: keep the rows that the --json file holds", bool)
    text = "with --compare: measure no time, and share the coarse pass between masks: several times faster"
    option(parser, "--accuracy-only", text, bool)
    option(parser, "--report OUT", "with --compare: also write an HTML report", output_file)
    add_data(parser, "val")
    add_json(parser)
    add_views(parser)
    add_runtime(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    for name in ("policies", "exchange", "merge", "report", "resume", "accuracy-only"):
        if getattr(args, name.replace("-", "_")) not in (None, False) and args.compare is None:
            args.usage_error(f"argument --{name}: only with --compare; add --compare F")
    if args.compare and views(args) != ONCE:
        args.usage_error("argument --compare: not with --flip, --scales or --window")
    if args.accuracy_only and args.runtime not in (AUTO, TORCH):
        args.usage_error("argument --runtime: not with --accuracy-only, which shares passes in torch")
    if args.resume and not args.json:
        args.usage_error("argument --resume: name the file to resume; add --json OUT")
    with joined_processes(args.device) as (processes, device):
        if args.compare is not None and processes.count > 1:
            raise ConfigError("--compare measures time, which takes one process: run it without torchrun")
        subject = opened(args, device, *written(args.json, args.report))
        check_dense(args, subject.model)
        if args.compare is None:
            _evaluate(subject, args, processes)
            return 0
        policies, rules = args.policies or ["edge", "oracle"], (args.exchange or (), args.merge or ())
        ways = comparison_ways(subject.model, policies, args.compare, *rules)
        runtime = TORCH if args.accuracy_only else args.runtime
        files = args.json, args.report
        compare_and_report(subject, ways, *files, args.resume, not args.accuracy_only, runtime)
    return 0


def _evaluate(subject: Opened, args: argparse.Namespace, processes: Processes) -> None:
    """Evaluate one way; processes share the frames, and the first one prints."""
    config, _, model, dataset, _, limit = subject
    way, looks = Way(args.dense), views(args)
    refusal = "processes share the images" if processes.count > 1 else None  # results must not depend on it
    runner = Runner(model, args.runtime, way, refusal)
    result = evaluate(model, dataset, config.data, way, limit, looks, processes, runner)
    if not processes.is_first:
        return
    rows = [
        {"name": name, "iou": 100 * iou}
        for name, iou in zip(dataset.classes.names, result.metrics.class_iou, strict=True)
    ]
    print(Table([Column("name", "class"), Column("iou", "IoU %", "{:.1f}")], rows).to_text())
    metrics, fine = result.metrics, result.fine_fraction
    print(
        f"mIoU {100 * metrics.miou:.2f}  boundary mIoU {100 * metrics.boundary_miou:.2f}  "
        f"pixel accuracy {100 * metrics.pixel_accuracy:.2f}  "
        f"({'dense' if fine is None else f'fine fraction {fine:.3f}'}; {result.images} images, "
        f"{result.images_per_second:.2f} images/s)"
    )
    print(runner.report())
    if args.json:
        content = {"runtime": list(runner.runs), "classes": dataset.classes.names, "result": result.as_dict()}
        write_result(args.json, content)
