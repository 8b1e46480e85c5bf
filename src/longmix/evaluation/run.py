"""`evaluate(config)`: from a checkpoint's folder to tables, JSON files and pictures; `evaluate_all`: from a sweep's."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from longmix.allocation import allocation_errors
from longmix.checkpoints import CheckpointStore, chosen_checkpoint, find_checkpoint
from longmix.checkpoints.find import LAST
from longmix.config import Choice, EvaluateConfig, read
from longmix.data.synthetic.base import SyntheticData
from longmix.data.tokens.tokenizers import NumberTokenizer
from longmix.data.training_data import TrainingData, build_data
from longmix.errors import CheckpointError, ConfigError, Interrupted, LongmixError, ProcessLost, settings_at
from longmix.evaluation.provenance import is_own
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Task
from longmix.files import check_folder
from longmix.mixers.parts.base import Mixer
from longmix.notices import begin_run
from longmix.printable import LINES, printable
from longmix.reading import found_below
from longmix.restore import Restored, restored_for
from longmix.trust import checked_data


def evaluate(config: DictConfig | Mapping[str, Any], restored: Restored | None = None) -> dict[str, Any]:
    """Run the tasks of `config` on its checkpoint and return the report of each by its name.

    A task that is refused, or fails, says so on standard error, and the others still run.

    Args:
        config: the words.
        restored: the checkpoint's content, where it is at hand.

    Raises:
        LongmixError: see `longmix.errors`; of several tasks, after the last of them.
    """
    own = read(EvaluateConfig, config)
    tasks = _built(own.task)
    _check_stride(own, tasks.values())
    restored = restored or restored_for(own)
    home = _home(restored.checkpoint) if own.states is None else _folder(Path(own.states))
    output = Path(own.output) if own.output else home / "evaluation"
    check_folder(output)
    own_data = is_own(own.data, restored.config.data)
    subject = Subject(restored, _data(own, restored), own, output, own_data)
    reports: dict[str, Any] = {}
    errors: list[LongmixError] = []
    for name, task in tasks.items():
        try:
            if not task.takes_leaky:
                refuse_leaky(restored.model.mixers())
            with _memory_errors(name), settings_at(f"task.{name}", task.usual_place):
                reports[name] = task.run(subject)
        except (Interrupted, ProcessLost):
            raise
        except LongmixError as error:
            if len(tasks) == 1:
                raise
            errors.append(error)
            print(f"task={name}: {type(error).__name__}: {printable(error, keep=LINES)}", file=sys.stderr)
    if errors:
        raise _of_several(errors, f"{len(errors)} of {len(tasks)} tasks failed; each said why above.")
    return reports


def evaluate_all(config: DictConfig) -> dict[Path, dict[str, Any]]:
    """Evaluate a checkpoint, or every run below a folder that is none itself, one after the other.

    A run that is refused does not keep the others from being evaluated.

    Returns:
        The reports of `evaluate` by the folder of each run.

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
        stores = found_below(folder, "checkpoints")
        return [store.parent for store in stores if CheckpointStore(store).latest() is not None]
    return []


def _of_several(errors: list[LongmixError], message: str) -> LongmixError:
    """One error for several, with the exit code of the first."""
    error = LongmixError(message)
    error.exit_code = errors[0].exit_code
    return error


@contextmanager
def _memory_errors(task: str) -> Iterator[None]:
    """Turn a refused allocation into one line.

    Raises:
        ConfigError: names the task and what to change.
    """
    with allocation_errors(f"task={task}", "give a smaller batch_size or seq_len, or shorter lengths of the task."):
        yield


def _data(own: EvaluateConfig, restored: Restored) -> TrainingData:
    """The data to evaluate on.

    Raises:
        ConfigError: the checkpoint names none and neither do the words, or the model does not know their tokens.
    """
    config, choice = restored.config, own.data
    if choice is None:
        if config.data is None:
            raise ConfigError(f"{restored.checkpoint} says nothing of data; add data=, such as data=sotu.")
        choice = checked_data(config.data, own.trust)
    data = build_data(choice, restored.tokenizer, seq_len=config.seq_len, batch_size=1, seed=config.seed)
    numbers = isinstance(restored.tokenizer, NumberTokenizer)
    if isinstance(data, SyntheticData) and not numbers:
        raise ConfigError(
            f"data are a synthetic task, {data.label}, of {data.expected_vocab_size:,} numbers, and the model of "
            f"{restored.checkpoint} was trained on text, with {restored.tokenizer.vocab_size:,} tokens; evaluate a "
            "model that was trained on the task, or give data of text."
        )
    if numbers and not isinstance(data, SyntheticData):
        raise ConfigError(
            f"data are text, {data.label}, and the model of {restored.checkpoint} was trained on a synthetic task: its "
            f"{restored.tokenizer.vocab_size:,} tokens are numbers. Leave data= out, or evaluate a model of text."
        )
    return data


def _built(choices: Mapping[str, Choice]) -> dict[str, Task]:
    """The tasks by name; every one is checked and built before the first begins."""
    for choice in choices.values():
        choice.check(set(), Task)
    return {name: choice.build() for name, choice in choices.items()}


def _check_stride(own: EvaluateConfig, tasks: Iterable[Task]) -> None:
    """Refuse a stride that none of the tasks goes by.

    Raises:
        ConfigError: says which tasks do.
    """
    if own.stride is not None and not any(task.takes_stride for task in tasks):
        raise ConfigError(
            f"stride={own.stride} has no effect on task={','.join(own.task)}: task=loss (without prefixes) and "
            "task=accuracy go by it. Leave it out."
        )


def _home(checkpoint: Path) -> Path:
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def refuse_leaky(mixers: Iterable[Mixer]) -> None:
    """Refuse mixers of a model, by layer, in which later tokens change what is computed for earlier ones.

    Raises:
        ConfigError: names the setting and the layer.
    """
    for index, mixer in enumerate(mixers):
        if mixer.leaky:
            setting = mixer.leaky_setting or f"mixer {type(mixer).__name__}"
            raise ConfigError(
                f"the checkpoint was trained with {setting}, in which later tokens change what layer {index} computes "
                "for earlier ones: its loss is not that of a language model. Train with a causal mode or mixer; or "
                "task.loss.prefixes=64 runs the tokens before some targets on their own, which is honest."
            )
