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
    --module torchvision.models.segmentation:lraspp_mobilenet_v3_large --args num_classes=21
  sparse-seg convert r101.safetensors back.pth --to-dense
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_seg.checkpoint import load_backbone, load_model
from sparse_seg.checkpoint.file import SUFFIX
from sparse_seg.cli.arguments import number, whole_number
from sparse_seg.cli.options import output_file
from sparse_seg.config import parse_settings
from sparse_seg.conversion import SOURCES, Conversion, convert, to_dense, write_dense
from sparse_seg.conversion.module import ModuleConversion, convert_module
from sparse_seg.conversion.report import assumed_line, report, report_module
from sparse_seg.conversion.verify import explain, verify
from sparse_seg.data.class_sets import CLASS_SETS, read_classes
from sparse_seg.errors import CheckpointError
from sparse_seg.files import overwritten

MODULE_ONLY = ("args",)
SOURCES_ONLY = ("from", "arch", "output_stride", "allow_missing")
FORWARD_ONLY = (
    *("module", "args"),
    *("from", "arch", "num_classes", "output_stride", "set", "allow_missing", "trust", "verify"),
    *("prefix", "drop", "mean", "std", "classes", "threshold"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    files = (
        parser.add_argument("src", metavar="SRC", help="checkpoint to read"),
        parser.add_argument("dst", type=output_file, metavar="DST", help="file to write"),
    )
    parser.add_argument(
        "--module", metavar="PACKAGE:CALLABLE", help="what makes the network, where none of the sources did"
    )
    parser.add_argument(
        "--args", nargs="+", action=_pairs(files), metavar="KEY=VALUE", help="with --module: its arguments"
    )
    parser.add_argument(
        "--from",
        choices=("auto", *sorted(SOURCES)),
        help="where SRC comes from (default: auto, by the names of its tensors)",
    )
    parser.add_argument("--arch", metavar="NAME", help="fail unless SRC holds it, as deeplabv3_resnet50")
    parser.add_argument(
        "--num-classes", type=whole_number(1), metavar="K", help="fail unless SRC has as many classes"
    )
    parser.add_argument(
        "--classes",
        metavar="C",
        help=f"what the classes are, if SRC does not tell: {', '.join(CLASS_SETS)}, or a classes.yaml with "
        "names and colours (docs/own-data.md)",
    )
    parser.add_argument(
        "--output-stride",
        type=int,
        choices=(8, 16),
        help="that SRC was trained at, where tensors cannot tell (default: the source's own)",
    )
    parser.add_argument(
        "--threshold",
        type=number(1e-6, 1 - 1e-6),
        metavar="P",
        help="of a network of one logit: the probability above which a pixel is foreground (default: the "
        "source's, 0.5 or mmsegmentation's 0.3)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="model settings that tensors cannot tell, as bn_eps=0.001 or aspp_rates=[6,12,18]; of a module "
        "how it runs, as strides=[16,32] or mask.policy=edge",
    )
    parser.add_argument(
        "--allow-missing", nargs="+", choices=("head",), help="head: convert a backbone that has none"
    )
    parser.add_argument(
        "--trust", action="store_true", default=None, help="load a pickle that runs code, if you trust it"
    )
    parser.add_argument(
        "--prefix", metavar="P", help="prefix of the network's tensors in SRC; all others are left out"
    )
    parser.add_argument(
        "--drop", nargs="+", action="extend", metavar="P", help="leave out tensors whose names begin so"
    )
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}",
            nargs=3,
            type=float,
            metavar=("R", "G", "B"),
            help=f"{name} of SRC's input, in units of 0..1 (default: SRC's own, else ImageNet's)",
        )
    parser.add_argument(
        "--verify",
        action="store_true",
        default=None,
        help="run what was written on random input, in all its forms, and compare them",
    )
    parser.add_argument(
        "--to-dense", action="store_true", help="convert a converted SRC back to its own format and names"
    )
    parser.set_defaults(usage_error=parser.error)


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
    if args.to_dense:
        return _to_dense(args)
    if (args.mean is None) != (args.std is None):
        args.usage_error("arguments --mean and --std: give both")
    if args.std is not None and not all(0 < value <= 1 for value in args.std):
        args.usage_error("argument --std: in units of 0..1, above 0; divide those in 0..255 by 255")
    if args.mean is not None and not all(0 <= value <= 1 for value in args.mean):
        args.usage_error("argument --mean: in units of 0..1; divide those in 0..255 by 255")
    if Path(args.dst).suffix != SUFFIX:
        args.usage_error(f"argument DST: {args.dst} must end in .safetensors")
    options = vars(args)
    for option in SOURCES_ONLY if args.module else MODULE_ONLY:
        if options[option] is not None:
            name = "--" + option.replace("_", "-")
            args.usage_error(f"argument {name}: {'not' if args.module else 'only'} with --module")
    if args.module:
        of_module = _of_module(args)
        of_module.write(args.dst)
        _say(args, report_module(of_module))
        return 0
    conversion = _of_source(args)
    conversion.write(args.dst)
    _say(args, report(conversion), conversion.plan.has_head)
    if conversion.plan.assumed:
        print(assumed_line(conversion.plan.assumed))
    return 0


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    """What both conversions are told."""
    return {
        "overrides": parse_settings(args.set or []),
        "trust": bool(args.trust),
        "prefix": args.prefix,
        "drop": args.drop or (),
        "mean": args.mean,
        "std": args.std,
        "classes": None if args.classes is None else read_classes(args.classes),
    }


def _of_source(args: argparse.Namespace) -> Conversion:
    expected = vars(args)["from"] or "auto", args.arch, args.num_classes, args.output_stride
    missing = args.allow_missing or ()
    return convert(args.src, *expected, allow_missing=missing, threshold=args.threshold, **_shared(args))


def _of_module(args: argparse.Namespace) -> ModuleConversion:
    arguments = parse_settings(args.args or [], "--args")
    conversion = convert_module(args.src, args.module, arguments, **_shared(args))
    found = conversion.network.num_classes
    if args.num_classes not in (None, found):
        raise CheckpointError(f"{args.module} has {found} classes, not {args.num_classes}; give it by --args")
    return conversion


def _say(args: argparse.Namespace, text: str, has_head: bool = True) -> None:
    """Print a report and, where they are asked for, the differences; a backbone alone runs with a fresh head.

    Raises:
        CheckpointError: some differ that must not.
    """
    path = args.dst
    print(text)
    print(f"{'written':<10}{path}, {Path(path).stat().st_size / 1e6:.1f} MB")
    if not args.verify:
        return
    model = load_model(path) if has_head else load_backbone(path)
    result = verify(model)
    print("\n".join(explain(result, model)))
    if not result.agrees:
        raise CheckpointError(f"{path} computes other numbers in some of its forms: do not use it")


def _to_dense(args: argparse.Namespace) -> int:
    for option in FORWARD_ONLY:
        if vars(args)[option] is not None:
            args.usage_error(f"argument --{option.replace('_', '-')}: not with --to-dense")
    tensors = to_dense(args.src)
    write_dense(args.dst, tensors)
    print(f"{len(tensors)} tensors written to {args.dst}")
    return 0
