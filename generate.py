"""Generate text from a checkpoint: `python generate.py` is `longmix generate`, without an installed command."""

import sys

from longmix.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
