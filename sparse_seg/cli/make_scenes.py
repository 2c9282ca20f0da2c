"""Write synthetic street scenes in Cityscapes' file layout, to train and test without a download.

The same seed gives the same scenes; a larger count only adds to them. An output folder that already holds
just these scenes is kept as it is.

examples:
  sparse-seg make-scenes work/scenes --count 250 --size 256x512 --seed 0
  sparse-seg make-scenes work/video --count 10 --pan 8
"""

import argparse

from sparse_seg.cli.arguments import size, whole_number
from sparse_seg.cli.options import output_folder
from sparse_seg.data.scenes import FRAMES, SMALLEST_SIDE, write_scenes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this tool's arguments."""
    parser.add_argument(
        "out", type=output_folder, metavar="OUT", help="folder to make; must not exist or be empty"
    )
    parser.add_argument(
        "--count",
        type=whole_number(2),
        default=250,
        help="scenes, a fifth of them for val (default: %(default)s)",
    )
    parser.add_argument(
        "--size",
        type=size(SMALLEST_SIDE),
        default=(256, 512),
        metavar="HxW",
        help=f"height and width, px, from {SMALLEST_SIDE} (default: 256x512)",
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="of the random scenes (default: %(default)s)"
    )
    parser.add_argument(
        "--pan",
        type=whole_number(0),
        metavar="PX",
        help=f"make a video of each scene: {FRAMES} frames, the camera turning by PX px a frame",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the scenes and says where they are.

    Raises:
        DataError: OUT holds something else or cannot be written.
    """
    written = write_scenes(args.out, args.count, args.size, args.seed, progress=True, pan=args.pan)
    print(f"{args.count} scenes {'written to' if written else 'are already in'} {args.out}")
    return 0
