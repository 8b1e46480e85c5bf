"""One command for many runs: `evaluate.py checkpoint=FOLDER`, where the folder is a sweep's."""

import sys
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from longmix.checkpoints import CheckpointStore, find_checkpoint
from longmix.errors import CheckpointError, ConfigError, DataError, LongmixError
from longmix.evaluation.run import evaluate


def evaluate_all(config: DictConfig) -> dict[Path, dict[str, Any]]:
    """Evaluate a checkpoint, or every run below a folder that is none itself, one after the other.

    A run that is refused does not keep the others from being evaluated.

    Returns:
        What `evaluate` returned, by the folder that it was given.

    Raises:
        LongmixError: see `evaluate`; and if a run of several was refused.
    """
    folder = Path() if OmegaConf.is_missing(config, "checkpoint") else Path(config.checkpoint)
    runs = runs_below(folder)
    if not runs:
        return {folder: evaluate(config)}
    for word in ("output", "states"):
        if config[word] is not None:
            raise ConfigError(f"{word}={config[word]} is of one run, and {folder} holds {len(runs)}; leave it out.")
    reports = {}
    for number, run in enumerate(runs, start=1):
        Console().print(f"{number} of {len(runs)}: {run}", highlight=False, markup=False, soft_wrap=True)
        try:
            reports[run] = evaluate(cast(DictConfig, OmegaConf.merge(config, {"checkpoint": str(run)})))
        except (ConfigError, DataError, CheckpointError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    if len(reports) < len(runs):
        raise LongmixError(f"{len(runs) - len(reports)} of {len(runs)} runs were not evaluated; each said why above.")
    return reports


def runs_below(folder: Path) -> list[Path]:
    """The runs with a checkpoint anywhere below a folder; none if it means a checkpoint itself, or does not exist."""
    try:
        find_checkpoint(folder)
    except CheckpointError:
        stores = sorted(folder.rglob("checkpoints"))
        return [store.parent for store in stores if CheckpointStore(store).latest() is not None]
    return []
