"""One command for many runs: `evaluate.py checkpoint=FOLDER`, where the folder is a sweep's."""

import sys
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from longmix.checkpoints import CheckpointStore, chosen_checkpoint, find_checkpoint
from longmix.checkpoints.last import LAST
from longmix.errors import CheckpointError, ConfigError, Interrupted, LongmixError, ProcessLost
from longmix.evaluation.run import evaluate
from longmix.notices import begin_run
from longmix.printable import LINES, printable


def evaluate_all(config: DictConfig) -> dict[Path, dict[str, Any]]:
    """Evaluate a checkpoint, or every run below a folder that is none itself, one after the other.

    A run that is refused does not keep the others from being evaluated.

    Returns:
        What `evaluate` returned, by the folder that it was given.

    Raises:
        LongmixError: see `evaluate`; and if a run of several was refused.
    """
    if OmegaConf.is_missing(config, "checkpoint") or not config.checkpoint:
        raise ConfigError(
            "no value was given for: checkpoint. Give the folder of a run, of one of its checkpoints or of a sweep, "
            "such as checkpoint=runs/NAME; checkpoint=last is the newest run."
        )
    if config.checkpoint == LAST:
        chosen = {"checkpoint": str(chosen_checkpoint(LAST))}
        config = cast(DictConfig, OmegaConf.merge(config, chosen))
    folder = Path(config.checkpoint)
    runs = runs_below(folder)
    if not runs:
        return {folder: evaluate(config)}
    for word in ("output", "states"):
        if config[word] is not None:
            raise ConfigError(f"{word}={config[word]} is of one run, and {folder} holds {len(runs)}; leave it out.")
    reports = {}
    for number, run in enumerate(runs, start=1):
        begin_run()
        words = f"{number} of {len(runs)}: {printable(run)}"
        Console().print(words, highlight=False, markup=False, soft_wrap=True)
        try:
            reports[run] = evaluate(cast(DictConfig, OmegaConf.merge(config, {"checkpoint": str(run)})))
        except (Interrupted, ProcessLost):
            raise
        except LongmixError as error:
            print(f"{type(error).__name__}: {printable(error, keep=LINES)}", file=sys.stderr)
    if len(reports) < len(runs):
        failed = f"{len(runs) - len(reports)} of {len(runs)} runs"
        raise LongmixError(f"{failed} were not evaluated, or not by every task; each said why above.")
    return reports


def runs_below(folder: Path) -> list[Path]:
    """The runs with a checkpoint anywhere below a folder; none if it means a checkpoint itself, or does not exist."""
    try:
        find_checkpoint(folder)
    except CheckpointError:
        stores = sorted(folder.rglob("checkpoints"))
        return [store.parent for store in stores if CheckpointStore(store).latest() is not None]
    return []
