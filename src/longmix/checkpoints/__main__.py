"""`python -m longmix.checkpoints`: the newest sharded checkpoint of a run in one file, or the mean of its last ones.

consolidate runs/NAME [OUT]
average runs/NAME --last 5 [--output OUT]
"""

import argparse
import sys
from pathlib import Path

from longmix import startup
from longmix.checkpoints.average import average, last_checkpoints
from longmix.checkpoints.find import chosen_checkpoint
from longmix.checkpoints.load import load_checkpoint
from longmix.checkpoints.store import final_name
from longmix.checkpoints.verify import INFO_FILE, WHOLE, read_info
from longmix.checkpoints.whole import write_whole
from longmix.command_line.options import OptionParser, path_option
from longmix.command_line.program import as_called, in_dialect
from longmix.errors import ConfigError, LongmixError
from longmix.files import atomic_directory, check_folder, write_json
from longmix.progress import bytes_bar


def consolidate(checkpoint: Path | str, target: Path | str) -> None:
    """Write the whole form of a sharded checkpoint, in one process; it takes as much memory as the state.

    Args:
        checkpoint: its folder, which stays.
        target: the folder to make, which is a checkpoint then.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: it is whole already, or the target is there.
        StorageError: the target cannot be written.
    """
    checkpoint, target = Path(checkpoint), Path(target)
    info = read_info(checkpoint)
    if info.get("format") == WHOLE:
        raise ConfigError(f"{checkpoint} is in one file already.")
    if target.exists():
        raise ConfigError(f"{target} is there already; give another folder.")
    check_folder(target.parent)
    state = load_checkpoint(checkpoint)
    about = {key: value for key, value in info.items() if key not in ("files", "processes")}
    size = sum(facts["bytes"] for facts in info["files"].values())
    with atomic_directory(target) as folder, bytes_bar(f"writing {target}", size) as advance:
        facts = write_whole(folder, state, advance)
        write_json(folder / INFO_FILE, about | {"format": WHOLE} | facts)


def main(words: list[str] | None = None) -> int:
    """Run `consolidate` or `average` with these words, or with those of the command line; returns the exit code."""
    parser = OptionParser(prog=as_called("python -m longmix.checkpoints"))
    commands = parser.add_subparsers(required=True, metavar="consolidate|average")
    command = commands.add_parser("consolidate", help="write a sharded checkpoint in one file")
    command.add_argument(
        "checkpoint", type=path_option, help="folder of a run (its newest checkpoint) or of a checkpoint"
    )
    command.add_argument(
        "output", type=path_option, nargs="?", help="folder to make; the checkpoint's name with -whole"
    )
    command.set_defaults(run=_consolidate)
    command = commands.add_parser("average", help="write the mean of a run's last checkpoints as one")
    command.add_argument("checkpoint", type=path_option, help="folder of a run")
    command.add_argument("--last", type=int, required=True, help="how many checkpoints")
    command.add_argument("--weights", choices=["trained", "ema"], default="trained", help="which weights of each")
    command.add_argument("--output", type=path_option, help="folder to make; default: the run's, in it average-of-LAST")
    command.set_defaults(run=_average)
    try:
        arguments = parser.parse_args(words)
        output = arguments.run(arguments)
    except LongmixError as error:
        print(in_dialect(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return error.exit_code
    print(f"wrote {output}")
    return 0


def _consolidate(arguments: argparse.Namespace) -> Path:
    checkpoint = chosen_checkpoint(arguments.checkpoint)
    output: Path = arguments.output or checkpoint.with_name(f"{final_name(checkpoint.name)}-whole")
    consolidate(checkpoint, output)
    return output


def _average(arguments: argparse.Namespace) -> Path:
    checkpoints = last_checkpoints(arguments.checkpoint, arguments.last)
    output: Path = arguments.output or arguments.checkpoint / f"average-of-{arguments.last}"
    average(checkpoints, output, arguments.weights)
    return output


if __name__ == "__main__":
    startup.begin()
    sys.exit(main())
