"""Command line of `sparse_seg.cli.calibrate`: run with --help."""

import sys

from sparse_seg.cli import main

if __name__ == "__main__":
    sys.exit(main(["calibrate", *sys.argv[1:]]))
