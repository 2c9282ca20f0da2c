"""Convert a dense checkpoint to a selective network with the same numbers, without retraining, or back.

Reads files of torchvision, timm, segmentation_models.pytorch (smp), VainF/DeepLabV3Plus-Pytorch,
mmsegmentation and visinf/cad. DST, a .safetensors file, holds weights and model settings: evaluate and
predict need nothing else (their CONFIG gives data and mask). Every tensor of SRC finds a place, is set aside
for a stated reason, or the conversion fails. With --to-dense SRC is a converted file, and DST (.pth, .pt or
.safetensors) gets all tensors back by their old names, bit for bit.

examples:
  sparse-seg convert deeplabv3_resnet101.pth r101.safetensors --verify
  sparse-seg convert best_deeplabv3plus.pth v3plus.safetensors --from vainf --output-stride 16
  sparse-seg convert resnet50.pth backbone.safetensors --allow-missing head
  sparse-seg convert r101.safetensors back.pth --to-dense
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sparse_seg.cli.arguments import whole_number
from sparse_seg.cli.options import output_file
from sparse_seg.config import parse_settings
from sparse_seg.conversion import SOURCES, convert, report, to_dense, write_dense
from sparse_seg.conversion.converted import is_safetensors, read_description
from sparse_seg.conversion.loading import load_backbone, load_converted
from sparse_seg.conversion.reading import TRUST_FLAG
from sparse_seg.conversion.verify import explain, verify
from sparse_seg.errors import CheckpointError

FORWARD_ONLY = ("from", "arch", "num_classes", "output_stride", "set", "allow_missing", "trust", "verify")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="checkpoint to read")
    parser.add_argument("dst", type=output_file, metavar="DST", help="file to write")
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
        "--output-stride",
        type=int,
        choices=(8, 16),
        help="that SRC was trained at, where tensors cannot tell (default: the source's own)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        metavar="KEY=VALUE",
        help="model settings that tensors cannot tell, as bn_eps=0.001 or aspp_rates=[6,12,18]",
    )
    parser.add_argument(
        "--allow-missing", nargs="+", choices=("head",), help="head: convert a backbone that has none"
    )
    parser.add_argument(
        TRUST_FLAG, action="store_true", default=None, help="load a pickle that runs code, if you trust it"
    )
    parser.add_argument(
        "--verify", action="store_true", default=None, help="then run it on random input and compare"
    )
    parser.add_argument("--to-dense", action="store_true", help="convert back")
    parser.set_defaults(usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    if Path(args.dst).exists() and Path(args.src).exists() and Path(args.src).samefile(args.dst):
        args.usage_error("argument DST: is SRC; name another file")
    if args.to_dense:
        return _to_dense(args)
    if not is_safetensors(args.dst):
        args.usage_error(f"argument DST: {args.dst} must end in .safetensors")
    options = vars(args)
    conversion = convert(
        args.src,
        options["from"] or "auto",
        args.arch,
        args.num_classes,
        args.output_stride,
        parse_settings(args.set or []),
        args.allow_missing or (),
        bool(args.trust),
    )
    conversion.write(args.dst)
    print(report(conversion))
    print(f"{'written':<10}{args.dst}, {Path(args.dst).stat().st_size / 1e6:.1f} MB")
    return _verify(args.dst, conversion.plan.has_head) if args.verify else 0


def _verify(path: str, has_head: bool) -> int:
    """Print the differences; 1 where some differ that must not."""
    model = load_converted(path) if has_head else load_backbone(path)
    result = verify(model, has_head)
    print("\n".join(explain(result, read_description(path).config)))
    if not result.always_agree:
        raise CheckpointError(f"{path} computes other numbers in some of its forms: do not use it")
    return 0


def _to_dense(args: argparse.Namespace) -> int:
    for option in FORWARD_ONLY:
        if vars(args)[option] is not None:
            args.usage_error(f"argument --{option.replace('_', '-')}: not with --to-dense")
    tensors = to_dense(args.src)
    write_dense(args.dst, tensors)
    print(f"{len(tensors)} tensors written to {args.dst}")
    return 0
