"""Time, multiply-adds and memory of one network run dense and selective, on one rendered scene.

The baseline is the same network dense at the finest of its strides, plain convolutions in channels_last
memory. Scopes: network (images to logits, mask included, batch norm folded into the weights, of the baseline
too) and train (a training step). The ways to run take turns, so that drift of the machine falls on all alike.
The mask is the config's policy; weights are random unless --checkpoint gives them. Memory is what a run needs
beyond weights and input.

examples:
  sparse-seg benchmark configs/bench_r50.yaml --json bench_r50.json
  sparse-seg benchmark configs/bench_r101.yaml --size 1024x2048 --device cuda --dtype float16
  sparse-seg benchmark configs/bench_r50.yaml --fine-fraction 0.15 --batch 2 --scopes train
  sparse-seg benchmark configs/bench_r50.yaml --fine-fraction 0.1 --policies given confidence
  sparse-seg benchmark configs/camvid_light.yaml --checkpoint camvid-slim --size 360x480 --scopes \\
    --runtimes onnxruntime --peer-onnx pidnet_s.onnx ddrnet.onnx
"""

import argparse
from typing import Any

import torch

from sparse_seg.cli.arguments import fraction, option, size, whole_number
from sparse_seg.cli.options import CHECKPOINT, add_config, add_device, add_json, input_files, merges
from sparse_seg.config import load_config, num_classes
from sparse_seg.data.scenes import SMALLEST_SIDE
from sparse_seg.errors import ConfigError
from sparse_seg.evaluation.cost import checkpoint_bytes, count_parameters
from sparse_seg.export.runner import TORCH
from sparse_seg.export.runtime import RUNTIMES, check_runtime
from sparse_seg.files import check_outputs
from sparse_seg.lab.benchmark.measure import COLUMNS, PEERS, Subject, cases, measure_cases
from sparse_seg.lab.benchmark.runtimes import Opener, peer_graphs, read_accuracies, time_network
from sparse_seg.lab.benchmark.runtimes import rows as runtime_rows
from sparse_seg.lab.provenance import provenance, write_result
from sparse_seg.lab.report.tables import table
from sparse_seg.masks import POLICIES

SCOPES = ("network", "train")
ENGINES = ["gather", "spconv"]
FRACTIONS = (0.05, 0.1, 0.2, 0.3, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    option(parser, "--checkpoint C", CHECKPOINT, told="random ones")
    option(parser, "--size HxW", "of the images, px", size(SMALLEST_SIDE), (512, 1024), told="512x1024")
    option(parser, "--batch N", "images", whole_number(1), 1)
    told = f"{' '.join(map(str, FRACTIONS))}; the config's of --runtimes"
    text = "selective at these shares of fine blocks"
    option(parser, "--fine-fraction F", text, fraction, told=told, nargs="+")
    text, told = "of 3x3 convolutions at extra sites", "both, if they run here"
    option(parser, "--engines", text, default=ENGINES, told=told, nargs="+", choices=ENGINES)
    text = "network, train, or nothing at all"
    option(parser, "--scopes", text, default=["network"], told="network", nargs="*", choices=SCOPES)
    policies = ["given", *sorted(set(POLICIES) - {"uniform"})]
    text = "also these mask policies; given: the config's mask, ready made"
    option(parser, "--policies P", text, default=[], told="none", nargs="+", choices=policies)
    option(parser, "--peers", f"also {', '.join(PEERS)}, where installed", bool)
    text = "also dense and selective (the config's mask) in these, each in a process of its own"
    option(parser, "--runtimes", text, nargs="+", choices=(TORCH, *RUNTIMES))
    option(parser, "--threads N", "of a process of --runtimes", whole_number(1), 2)
    text = "with --runtimes: also networks of others, ONNX files whose one input is an image of --size"
    option(parser, "--peer-onnx FILE", text, default=[], told="none", nargs="+")
    text = "with --runtimes: what evaluate --compare wrote of these weights; adds accuracy share and lift"
    option(parser, "--accuracy JSON", text)
    option(parser, "--dtype", "of the network", default="float32", choices=("float32", "float16"))
    option(parser, "--repeats N", "timings of each", whole_number(1), 5)
    option(parser, "--no-memory", "leave peak memory out (much faster)", bool)
    add_json(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    if args.peer_onnx and not set(RUNTIMES) & set(args.runtimes or ()):
        args.usage_error(f"argument --peer-onnx: needs --runtimes with {' or '.join(RUNTIMES)}")
    for runtime in set(RUNTIMES) & set(args.runtimes or ()):
        check_runtime(runtime)
    config = load_config(args.config, args.set)
    config.model.num_classes = num_classes(config)
    if args.json:
        others = [*args.peer_onnx, *filter(None, [args.accuracy])]
        check_outputs([args.json], [*input_files(args.config, config, args.checkpoint), *others])
    if args.device.type == "cuda":  # the baseline gets cuDNN's best algorithms, and all alike TF32
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    peers = peer_graphs(args.peer_onnx, args.runtimes or (), (1, 3, *args.size))
    dtype = getattr(torch, args.dtype)
    subject = Subject(config, args.checkpoint, args.size, args.batch, args.device, dtype)
    notes, rows = list[str](), list[dict[str, Any]]()
    strides = subject.model.strides
    if "train" in args.scopes and args.batch < 2 and subject.model.norms_vectors:
        raise ConfigError("a training step needs --batch 2 or more: a norm sees one vector of each image")
    fractions, engines = args.fine_fraction or FRACTIONS, list(dict.fromkeys(args.engines))
    for scope in dict.fromkeys(args.scopes):
        todo = cases(scope, fractions, engines, strides, args.policies, PEERS if args.peers else ())
        rows += measure_cases(subject, todo, args.repeats, not args.no_memory, notes=notes.append)
    if rows:
        print(table(rows, COLUMNS).to_text())
    timed = _runtimes(args, subject, peers) if args.runtimes else []
    origin = provenance() | {
        "setup": {"size": args.size, "batch": args.batch, "device": str(args.device), "dtype": args.dtype},
        "policy": config.model.mask.policy,
        "repeats": args.repeats,
        "parameters": count_parameters(subject.model),
        "checkpoint_bytes": checkpoint_bytes(subject.model),
        "notes": list(dict.fromkeys(notes)),
    }
    print(_footer(origin))
    if args.json:
        write_result(args.json, origin | {"rows": rows, "runtimes": timed})
    return 0


def _runtimes(args: argparse.Namespace, subject: Subject, peers: dict[str, Opener]) -> list[dict[str, Any]]:
    """The network, and peers, in other runtimes, on the subject's first image."""
    model, image = subject.float_model.cpu(), subject.images[:1].cpu().float().contiguous()
    accuracies = read_accuracies(args.accuracy, model) if args.accuracy else None
    forms = args.runtimes, merges(model), args.fine_fraction or [None]
    timed = time_network(model, image.numpy(), args.threads, *forms, args.repeats, peers=peers)
    rows = [{"threads": args.threads} | row for row in runtime_rows(timed, accuracies)]
    print(f"{args.threads} threads, a process each; shares are of the way from dense OS16 to OS8")
    print(table(rows).to_text())
    return rows


def _footer(origin: dict[str, Any]) -> str:
    setup = origin["setup"]
    height, width = setup["size"]
    lines = [
        f"{origin['machine']}, {origin['threads']} threads, torch {origin['torch']}, {setup['dtype']} on "
        f"{setup['device']}, {setup['batch']} x {height}x{width} px, {origin['policy']} mask; medians of "
        f"{origin['repeats']}, ± half the distance between quartiles",
        f"{origin['parameters'] / 1e6:.2f} M parameters, {origin['checkpoint_bytes'] / 1e6:.1f} MB on disk",
        *origin["notes"],
    ]
    return "\n".join(lines)
