"""`python -m longmix.share`: a trained model with shared projections, or one that shares none again, as a checkpoint.

runs/NAME --names query key value --atoms 4 [--output OUT]
runs/NAME --undo [--output OUT]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from longmix import startup
from longmix.checkpoints.average import KEPT
from longmix.checkpoints.contents import Weights, load_model_state, rebuilding
from longmix.checkpoints.find import chosen_checkpoint
from longmix.checkpoints.store import final_name
from longmix.checkpoints.verify import INFO_FILE, WHOLE, read_info
from longmix.checkpoints.whole import write_whole
from longmix.command_line.options import OptionParser, path_option
from longmix.command_line.program import as_called, in_dialect
from longmix.errors import ConfigError, LongmixError
from longmix.files import atomic_directory, check_folder, write_json
from longmix.model.sharing import NOTHING_SHARED, Sharing
from longmix.model.sharing_conversion import dense_state, is_shared, shared_state
from longmix.progress import bytes_bar
from longmix.trust import check_model_nodes


def convert(
    checkpoint: Path | str, target: Path | str, sharing: Sharing = NOTHING_SHARED, weights: Weights = "trained"
) -> dict[str, float]:
    """Write a checkpoint whose layers share what `sharing` says, or nothing, from which new runs begin.

    Args:
        checkpoint: folder of a run or checkpoint, which stays.
        target: the folder to make.
        sharing: see `shared_state`.
        weights: "trained", or "ema" for their average over the steps.

    Returns:
        What each name leaves out, see `shared_state`.

    Raises:
        ConfigError: the target is there, names are wrong, or there is nothing to undo.
        CheckpointError: the checkpoint is damaged.
        StorageError: the target cannot be written.
    """
    path, target = chosen_checkpoint(checkpoint), Path(target)
    if target.exists():
        raise ConfigError(f"{target} is there already; give another folder.")
    check_folder(target.parent)
    state = load_model_state(path, weights)
    with rebuilding(path):
        check_model_nodes(state["config"])
        if not sharing.names and not is_shared(state):
            raise ConfigError(f"{path} shares no matrices between layers, so there is nothing to undo.")
        state, left_out = shared_state(state, sharing) if sharing.names else (dense_state(state), {})
    kept: dict[str, Any] = {key: value for key, value in state.items() if key in (*KEPT, "model")}
    size = sum(weight.nbytes for weight in state["model"].values())
    about = {key: value for key, value in read_info(path).items() if key in ("tokens", "stage")}
    info = {"format": WHOLE, "step": state["step"], "validation": {}}
    with atomic_directory(target) as folder, bytes_bar(f"writing {target}", size) as advance:
        facts = write_whole(folder, kept, advance)
        write_json(folder / INFO_FILE, about | info | facts)
    return left_out


def main(words: list[str] | None = None) -> int:
    """Convert a checkpoint as these words say, or those of the command line; returns the exit code."""
    try:
        arguments = _parser().parse_args(words)
        output = _convert(arguments)
    except LongmixError as error:
        print(in_dialect(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return error.exit_code
    print(f"wrote {output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(prog=as_called("python -m longmix.share"))
    parser.add_argument("checkpoint", type=path_option, help="folder of a run (its newest checkpoint) or a checkpoint")
    parser.add_argument("--names", nargs="+", help="of projections, such as query key value")
    parser.add_argument("--atoms", type=int, help="matrices of each name, fewer than layers")
    parser.add_argument("--undo", action="store_true", help="give all layers weights of their own again")
    parser.add_argument("--weights", choices=["trained", "ema"], default="trained", help="which weights")
    parser.add_argument(
        "--output", type=path_option, help="folder to make; the checkpoint's name with -shared, or -own"
    )
    return parser


def _convert(arguments: argparse.Namespace) -> Path:
    given = arguments.names is not None and arguments.atoms is not None
    if given == arguments.undo or (arguments.undo and (arguments.names or arguments.atoms)):
        raise ConfigError("give --names and --atoms, or --undo alone; --help lists the options.")
    checkpoint = chosen_checkpoint(arguments.checkpoint)
    suffix = "own" if arguments.undo else "shared"
    output: Path = arguments.output or checkpoint.with_name(f"{final_name(checkpoint.name)}-{suffix}")
    left_out = convert(checkpoint, output, Sharing(arguments.names, arguments.atoms), arguments.weights)
    for name, share in left_out.items():
        print(f"{name}: {share:.2%} of the squares of its weights are left out")
    return output


if __name__ == "__main__":
    startup.begin()
    sys.exit(main())
