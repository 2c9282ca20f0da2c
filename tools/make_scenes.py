"""Write synthetic street scenes: see `python tools/make_scenes.py --help`."""

import sys

from sparse_seg.cli import main

if __name__ == "__main__":
    sys.exit(main(["make_scenes", *sys.argv[1:]]))
