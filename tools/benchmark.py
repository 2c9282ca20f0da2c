"""Command line of `sparse_seg.cli.benchmark`: run with --help."""

import sys

from sparse_seg.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
