"""The best of runs that differ in a tuned setting alone, such as the learning rate: `--best`."""

from collections.abc import Sequence
from typing import Any

from longmix.errors import DataError
from longmix.reporting.runs import Run
from longmix.reporting.settings import NOT_THE_EXPERIMENT
from longmix.wording import did_you_mean, nearest

Experiment = tuple[tuple[str, str], ...]


def best_of(runs: Sequence[Run], tuned: Sequence[str]) -> list[Run]:
    """Of all runs that are alike but for the settings `tuned`, the best one.

    Args:
        runs: best first.
        tuned: full keys of settings, such as "optimizer.learning_rate", or of nodes, such as "optimizer".

    Returns:
        The runs that are left, best first.

    Raises:
        DataError: no run has such a setting.
    """
    known = list(dict.fromkeys(key for run in runs for key in run.settings))
    for key in tuned:
        if not any(_is_of(name, [key]) for name in known):
            raise DataError(f"--best {key}: no run has this setting.{did_you_mean(nearest(key, known))}")
    best: dict[Experiment, Run] = {}
    for run in runs:
        best.setdefault(_experiment(run, tuned), run)
    return list(best.values())


def _experiment(run: Run, tuned: Sequence[str]) -> Experiment:
    """A run's settings that say what is learned, but for the tuned ones; one without settings is alone."""
    if not run.settings:
        return (("folder", str(run.folder)),)
    left_out = (*NOT_THE_EXPERIMENT, *tuned)
    return tuple(sorted((key, _text(value)) for key, value in run.settings.items() if not _is_of(key, left_out)))


def _is_of(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _text(value: Any) -> str:
    return f"{type(value).__name__} {value}"
