"""`python -m longmix.checkpoints consolidate runs/NAME [OUT]`: the newest sharded checkpoint of a run in one file."""

import argparse
import sys
from pathlib import Path

from longmix import startup
from longmix.checkpoints.consolidate import consolidate
from longmix.checkpoints.find import chosen_checkpoint
from longmix.checkpoints.store import final_name
from longmix.command_line.program import as_called
from longmix.errors import LongmixError


def main(words: list[str] | None = None) -> int:
    """Run `consolidate` with these words, or with those of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog=as_called("python -m longmix.checkpoints"))
    commands = parser.add_subparsers(required=True, metavar="consolidate")
    command = commands.add_parser("consolidate", help="write a sharded checkpoint in one file")
    command.add_argument("checkpoint", type=Path, help="folder of a run (its newest checkpoint) or of a checkpoint")
    command.add_argument("output", type=Path, nargs="?", help="folder to make; the checkpoint's name with -whole")
    arguments = parser.parse_args(words)
    try:
        checkpoint = chosen_checkpoint(arguments.checkpoint)
        output = arguments.output or checkpoint.with_name(f"{final_name(checkpoint.name)}-whole")
        consolidate(checkpoint, output)
    except LongmixError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    startup.begin()
    sys.exit(main())
