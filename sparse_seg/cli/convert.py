"""Convert a dense checkpoint to a selective network with the same numbers, without retraining, or back.

Reads files of torchvision, timm, segmentation_models.pytorch (smp), VainF/DeepLabV3Plus-Pytorch,
mmsegmentation and visinf/cad. DST, a .safetensors file, holds weights, model settings and classes: predict
needs nothing else. Every tensor of SRC finds a place, is set aside for a stated reason, or the conversion
fails. With --to-dense SRC is a converted file, and DST (.pth, .pt or .safetensors) gets all tensors back by
their old names, bit for bit.

examples:
  sparse-seg convert deeplabv3_resnet101.pth r101.safetensors --verify --classes voc
  sparse-seg convert best_deeplabv3plus.pth v3plus.safetensors --from vainf --output-stride 16
  sparse-seg convert resnet50.pth backbone.safetensors --allow-missing head
  sparse-seg convert lraspp.pth lraspp.safetensors --classes voc --verify \\
    --module torchvision.models.segmentation:lraspp_mobilenet_v3_large \\
    --args num_classes=21 weights_backbone=null
  sparse-seg convert r101.safetensors back.pth --to-dense
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_seg.checkpoint import load_backbone, load_model
from sparse_seg.checkpoint.file import SUFFIX
from sparse_seg.cli.arguments import number, option, whole_number
from sparse_seg.cli.options import output_file
from sparse_seg.config import parse_settings
from sparse_seg.conversion import SOURCES, Conversion, convert, convert_module, to_dense, write_dense
from sparse_seg.conversion.verify import explain, verify
from sparse_seg.data.class_file import CLASS_SETS, read_classes
from sparse_seg.errors import CheckpointError, printable
from sparse_seg.files import overwritten

SOURCES_ONLY = {"from", "arch", "output_stride", "allow_missing"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    files = (
        parser.add_argument("src", metavar="SRC", help="checkpoint to read"),
        parser.add_argument("dst", type=output_file, metavar="DST", help="file to write"),
    )
    option(parser, "--module PACKAGE:CALLABLE", "what makes the network, where none of the sources did")
    text = "with --module: its arguments"
    parser.add_argument("--args", nargs="+", action=_pairs(files), metavar="KEY=VALUE", help=text)
    sources = ("auto", *sorted(SOURCES))
    option(
        parser, "--from", "where SRC comes from", told="auto, by the names of its tensors", choices=sources
    )
    option(parser, "--arch NAME", "fail unless SRC holds it, as deeplabv3_resnet50")
    option(parser, "--num-classes K", "fail unless SRC has as many classes", whole_number(1))
    text = f"what the classes are, if SRC does not tell: {', '.join(CLASS_SETS)}, or a classes.yaml with "
    option(parser, "--classes C", f"{text}names and colours (docs/own-data.md)")
    text = "that SRC was trained at, where tensors cannot tell"
    option(parser, "--output-stride", text, int, told="the source's own", choices=(8, 16))
    text = "of a network of one logit: the probability above which a pixel is foreground"
    told = "the source's, 0.5 or mmsegmentation's 0.3"
    option(parser, "--threshold P", text, number(1e-6, 1 - 1e-6), told=told)
    option(
        parser,
        "--set KEY=VALUE",
        "model settings that tensors cannot tell, as bn_eps=0.001 or aspp_rates=[6,12,18]; of a module how "
        "it runs, as strides=[16,32] or mask.policy=edge",
        nargs="+",
        action="extend",
    )
    text = "head: convert a backbone that has none"
    option(parser, "--allow-missing", text, nargs="+", choices=("head",))
    option(parser, "--trust", "load a pickle that runs code, if you trust it", bool)
    option(parser, "--prefix P", "prefix of the network's tensors in SRC; all others are left out")
    option(parser, "--drop P", "leave out tensors whose names begin so", nargs="+", action="extend")
    for name in ("mean", "std"):
        text, told = f"{name} of SRC's input, in units of 0..1", "SRC's own, else ImageNet's"
        option(parser, f"--{name}", text, float, told=told, nargs=3, metavar=("R", "G", "B"))
    text = "run what was written on random input, in all its forms, and compare them"
    option(parser, "--verify", text, bool)
    option(parser, "--to-dense", "convert a converted SRC back to its own format and names", bool)


def _pairs(files: Sequence[argparse.Action]) -> type[argparse.Action]:
    """An action that takes KEY=VALUE; what follows them without `=` is SRC and DST."""

    class Pairs(argparse.Action):
        def __call__(
            self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
        ) -> None:
            pairs = [text for text in values if "=" in text]
            setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), *pairs])
            for text in values:
                file = next((one for one in files if getattr(namespace, one.dest) is None), None)
                if text not in pairs and file is None:
                    parser.error(f"argument --args: {text!r} is no KEY=VALUE")
                elif text not in pairs and file is not None:
                    setattr(namespace, file.dest, file.type(text) if callable(file.type) else text)
                    file.required = False

    return Pairs


def run(args: argparse.Namespace) -> int:
    if overwritten([args.dst], [args.src, *filter(None, [args.classes])]):
        args.usage_error("argument DST: is SRC or the file of --classes; name another file")
    _check_options(args)
    if args.to_dense:
        tensors = to_dense(args.src)
        write_dense(args.dst, tensors)
        print(f"{len(tensors)} tensors written to {args.dst}")
        return 0
    found = _converted(args)
    found.write(args.dst)
    print(found.report)
    print(f"{'written':<10}{args.dst}, {Path(args.dst).stat().st_size / 1e6:.1f} MB")
    origin = found.checkpoint.origin
    if args.verify:
        _verify(args.dst, origin.has_head)
    if origin.assumed:
        print(printable(f"{'assumed':<10}{'; '.join(origin.assumed)}"))
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Options that exclude each other, and values out of range, are usage errors."""
    given = [name for name, value in vars(args).items() if value is not None and value is not False]
    refused, why = {"args"}, "only with --module"
    if args.to_dense:
        refused, why = set(given) - {"src", "dst", "to_dense", "usage_error"}, "not with --to-dense"
    elif args.module:
        refused, why = SOURCES_ONLY, "not with --module"
    for name in given:
        if name in refused:
            args.usage_error(f"argument --{name.replace('_', '-')}: {why}")
    if (args.mean is None) != (args.std is None):
        args.usage_error("arguments --mean and --std: give both")
    if args.std is not None and not all(0 < value <= 1 for value in args.std):
        args.usage_error("argument --std: in units of 0..1, above 0; divide those in 0..255 by 255")
    if args.mean is not None and not all(0 <= value <= 1 for value in args.mean):
        args.usage_error("argument --mean: in units of 0..1; divide those in 0..255 by 255")
    if not args.to_dense and Path(args.dst).suffix != SUFFIX:
        args.usage_error(f"argument DST: {args.dst} must end in .safetensors")


def _converted(args: argparse.Namespace) -> Conversion:
    shared: dict[str, Any] = {
        "overrides": parse_settings(args.set or []),
        "trust": bool(args.trust),
        "prefix": args.prefix,
        "drop": args.drop or (),
        "mean": args.mean,
        "std": args.std,
        "classes": None if args.classes is None else read_classes(args.classes),
    }
    if args.module:
        found = convert_module(args.src, args.module, parse_settings(args.args or [], "--args"), **shared)
    else:
        missing, source = args.allow_missing or (), vars(args)["from"] or "auto"
        shared |= {"allow_missing": missing, "threshold": args.threshold}
        found = convert(args.src, source, args.output_stride, **shared)
    arch, classes = found.checkpoint.origin.arch, found.checkpoint.config.num_classes
    if args.arch not in (None, arch):
        raise CheckpointError(f"{args.src}: it holds a {arch}, not a {args.arch}")
    if args.num_classes not in (None, classes):
        hint = "; give it by --args" if args.module else ""
        raise CheckpointError(f"{args.src}: it has {classes or 'no'} classes, not {args.num_classes}{hint}")
    return found


def _verify(path: str, has_head: bool) -> None:
    """Print how far the forms of what was written differ; a backbone alone runs with a fresh head.

    Raises:
        CheckpointError: some differ that must not.
    """
    model = load_model(path) if has_head else load_backbone(path)
    result = verify(model)
    print("\n".join(explain(result, model)))
    if not all(one.agrees for one in result if one.must):
        raise CheckpointError(f"{path} computes other numbers in some of its forms: do not use it")
