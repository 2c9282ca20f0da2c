"""Write synthetic street scenes in Cityscapes' file layout, to train and test without a download.

The same seed gives the same scenes; a larger count only adds to them. An output folder that already holds
just these scenes is kept as it is.

examples:
  sparse-seg make-scenes work/scenes --count 250 --size 256x512 --seed 0
  sparse-seg make-scenes work/video --count 10 --pan 8
"""

import argparse

from sparse_seg.cli.arguments import option, size, whole_number
from sparse_seg.cli.options import output_folder
from sparse_seg.data.scenes import FRAMES, SMALLEST_SIDE, write_scenes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option(parser, "out OUT", "folder to make; must not exist or be empty", output_folder)
    option(parser, "--count", "scenes, a fifth of them for val", whole_number(2), 250)
    text = f"height and width, px, from {SMALLEST_SIDE}"
    option(parser, "--size HxW", text, size(SMALLEST_SIDE), (256, 512), told="256x512")
    option(parser, "--seed", "of the random scenes", whole_number(0), 0)
    text = f"make a video of each scene: {FRAMES} frames, the camera turning by PX px a frame"
    option(parser, "--pan PX", text, whole_number(0))


def run(args: argparse.Namespace) -> int:
    """Writes the scenes and says where they are.

    Raises:
        DataError: OUT holds something else or cannot be written.
    """
    written = write_scenes(args.out, args.count, args.size, args.seed, pan=args.pan)
    print(f"{args.count} scenes {'written to' if written else 'are already in'} {args.out}")
    return 0
