"""Make token files: `python prepare.py` is `longmix prepare`, without an installed command."""

import sys

from longmix.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
