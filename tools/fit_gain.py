"""Command line of `sparse_seg.cli.fit_gain`: run with --help."""

import sys

from sparse_seg.cli import main

if __name__ == "__main__":
    sys.exit(main(["fit_gain", *sys.argv[1:]]))
