"""Command line of `sparse_seg.cli.train`: run with --help."""

import sys

from sparse_seg.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
