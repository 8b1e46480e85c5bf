"""Evaluate a checkpoint: `python evaluate.py` is `longmix evaluate`, without an installed command."""

import sys

from longmix.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
