"""Look at a dataset before training on it: one HTML page that needs no network.

Labels over images, how often each class occurs, frames that look odd, faulty files, and the first batch as
augmentation makes it. Every file of the splits train and val is read. The exit code is 1 if some are faulty;
the page then lists them.

example:
  sparse-seg browse own.yaml --out runs/own.html
"""

import argparse

from sparse_seg.cli.arguments import option, whole_number
from sparse_seg.cli.options import add_config, input_files, output_file
from sparse_seg.config import load_config
from sparse_seg.errors import DataError
from sparse_seg.files import check_outputs
from sparse_seg.lab.browse import write_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    option(parser, "--out", "file to write", output_file, "runs/browse.html")
    option(parser, "--count N", "frames to show of each split", whole_number(1), 12)


def run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.set)
    check_outputs([args.out], input_files(args.config, config))
    faults = write_page(config, args.out, args.count)
    print(f"page: {args.out}")
    if faults:
        more = f" (faulty files in all: {len(faults)}, listed in {args.out})" if len(faults) > 1 else ""
        raise DataError(f"{faults[0]}{more}")
    return 0
