"""Train a language model: `python train.py` is `longmix train`, without an installed command."""

import sys

from longmix.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
