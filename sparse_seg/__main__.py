"""`python -m sparse_seg COMMAND ...`."""

import sys

from sparse_seg.cli import main

if __name__ == "__main__":
    sys.exit(main())
