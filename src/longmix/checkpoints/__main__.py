"""`python -m longmix.checkpoints`: another form of a run's newest checkpoint, or the mean of its last ones.

consolidate runs/NAME [OUT]
average runs/NAME --last 5 [--output OUT]
share runs/NAME --names query key value --atoms 4 [--output OUT]
unshare runs/NAME [--output OUT]
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
    """Run a command with these words, or with those of the command line; returns the exit code."""
    parser = OptionParser(prog=as_called("python -m longmix.checkpoints"))
    commands = parser.add_subparsers(required=True, metavar="consolidate|average|share|unshare")
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
    command = commands.add_parser("share", help="write the nearest model whose layers share projections")
    command.add_argument("--names", nargs="+", required=True, help="of projections, such as query key value")
    command.add_argument("--atoms", type=int, required=True, help="matrices of each name, fewer than layers")
    _take_one(command, "shared")
    command = commands.add_parser("unshare", help="write a model that shares projections as one that does not")
    command.set_defaults(names=None, atoms=None)
    _take_one(command, "unshared")
    try:
        arguments = parser.parse_args(words)
        output = arguments.run(arguments)
    except LongmixError as error:
        print(in_dialect(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return error.exit_code
    print(f"wrote {output}")
    return 0


def _take_one(command: argparse.ArgumentParser, suffix: str) -> None:
    command.add_argument("checkpoint", type=path_option, help="folder of a run (its newest checkpoint) or a checkpoint")
    command.add_argument("--weights", choices=["trained", "ema"], default="trained", help="which weights")
    command.add_argument("--output", type=path_option, help=f"folder to make; the checkpoint's name with -{suffix}")
    command.set_defaults(run=_convert, suffix=suffix)


def _convert(arguments: argparse.Namespace) -> Path:
    from longmix.model.sharing import Sharing
    from longmix.model.sharing_conversion import convert

    checkpoint = chosen_checkpoint(arguments.checkpoint)
    output: Path = arguments.output or checkpoint.with_name(f"{final_name(checkpoint.name)}-{arguments.suffix}")
    left_out = convert(checkpoint, output, Sharing(arguments.names, arguments.atoms), arguments.weights)
    for name, share in left_out.items():
        print(f"{name}: {share:.2%} of the squares of its weights are left out")
    return output


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
