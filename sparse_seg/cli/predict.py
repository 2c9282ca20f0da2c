"""Segment images, or folders of images: writes an overlay, a class map and a picture of the fine blocks.

For each image NAME: D/NAME_overlay.png, D/NAME_classes.png and, unless --dense, D/NAME_blocks.png. With
--show-levels also D/NAME_levels.png, every block in the colour of its stride; with --steps D/NAME_steps.png,
how the coarse prediction is refined step by step where it is least certain.

examples:
  sparse-seg predict configs/camvid_r18.yaml runs/camvid_r18/best.pt street.jpg --out runs/pictures
  sparse-seg predict configs/camvid_r18.yaml runs/camvid_r18/best.pt frames/ --fine-fraction 0.3 --out out
  sparse-seg predict configs/camvid_r18.yaml runs/camvid_r18/best.pt street.jpg --steps 0 0.1 0.3 --out out
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from sparse_seg.checkpoint import load_model
from sparse_seg.cli.options import add_config, add_device, add_network, fraction, overrides
from sparse_seg.config import check_classes, load_config
from sparse_seg.data import dataset_classes
from sparse_seg.lab.predict import find_images, write_pictures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="best.pt or last.pt of a training run, or a converted file"
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image files, or folders of them")
    parser.add_argument("--out", required=True, metavar="D", help="folder to write to")
    parser.add_argument("--show-levels", action="store_true", help="also blocks coloured by stride")
    parser.add_argument(
        "--steps",
        nargs="+",
        type=fraction,
        metavar="F",
        help="also refinement to these rising fractions",
    )
    add_network(parser)
    parser.set_defaults(usage_error=parser.error)
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    if args.steps and args.steps != sorted(args.steps):
        args.usage_error(f"argument --steps: fractions must rise, not {args.steps}")
    config = load_config(args.config, overrides(args))
    check_classes(config)
    images = find_images(args.inputs)
    if any(Path(path).resolve() == Path(args.out).resolve() for path in args.inputs):
        args.usage_error(f"argument --out: {args.out} holds the images; name another folder")
    model = load_model(args.checkpoint, config).to(args.device)
    palette = dataset_classes(config.data.dataset, config.data.root).palette
    for path in tqdm(images, desc="predict", leave=False):
        write_pictures(model, path, args.out, palette, config.data, args.dense, args.show_levels, args.steps)
    print(f"{len(images)} images segmented; pictures in {args.out}")
    return 0
