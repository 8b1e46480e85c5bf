"""`python -m longmix.checkpoints consolidate runs/NAME [OUT]`: the newest sharded checkpoint of a run in one file."""

import sys
from pathlib import Path

from longmix import startup
from longmix.checkpoints.find import chosen_checkpoint
from longmix.checkpoints.load import load_checkpoint
from longmix.checkpoints.store import final_name
from longmix.checkpoints.verify import INFO_FILE, WHOLE, read_info
from longmix.checkpoints.whole import write_whole
from longmix.command_line.options import OptionParser, path_option
from longmix.command_line.program import as_called
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
    """Run `consolidate` with these words, or with those of the command line; returns the exit code."""
    parser = OptionParser(prog=as_called("python -m longmix.checkpoints"))
    commands = parser.add_subparsers(required=True, metavar="consolidate")
    command = commands.add_parser("consolidate", help="write a sharded checkpoint in one file")
    command.add_argument(
        "checkpoint", type=path_option, help="folder of a run (its newest checkpoint) or of a checkpoint"
    )
    command.add_argument(
        "output", type=path_option, nargs="?", help="folder to make; the checkpoint's name with -whole"
    )
    try:
        arguments = parser.parse_args(words)
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
