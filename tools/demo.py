"""Command line of `sparse_seg.cli.demo`: run with --help."""

import sys

from sparse_seg.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
