"""`loop.tasks`: tasks of `evaluate.py` that validations run too, whose numbers are logged beside the loss.

They leave training as it is: weights, gradients, random numbers and what was compiled are the same after them, bit for
bit. All processes run each task on the same rows, so that none waits for another; weights that are divided over
processes are put together for it.
"""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from longmix.allocation import allocation_errors
from longmix.command_line.schema import configs_folder
from longmix.config import Choice, EvaluateConfig, StagePart, StoredConfig, TaskWords, TrainConfig, defaults, plain
from longmix.config.nodes import settings, unknown_key
from longmix.config.rules import check_values
from longmix.data.training_data import TrainingData
from longmix.data.windows import check_stride
from longmix.distributed.agreement import Processes
from longmix.errors import ConfigError, Interrupted, LongmixError, ProcessLost, settings_at
from longmix.evaluation.run import refuse_leaky
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Task
from longmix.metrics import Metrics
from longmix.mixers.parts.base import Mixer
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model
from longmix.progress import without_bars
from longmix.restore import Restored
from longmix.training import random_state, strategies
from longmix.training.warm_start import begin
from longmix.wording import did_you_mean, nearest

TASK, NAME = "task", "name"

SHOWN = 3
"""Numbers of a task that the terminal shows; the log has all."""


@dataclass(frozen=True)
class TaskDuring:
    """A task to run during training.

    Attributes:
        key: its place in the configuration, such as "loop.tasks[0]".
        name: in the log.
        task: what to run.
        words: those that `evaluate.py` would have beside it.
    """

    key: str
    name: str
    task: Task
    words: TaskWords

    def config(self, data: TrainingData) -> EvaluateConfig:
        """The words of an evaluation of the model in training."""
        words = {name: value for name, value in vars(self.words).items() if name != NAME}
        words["max_tokens"] = self.words.max_tokens or data.validation_tokens
        return EvaluateConfig(checkpoint="", task={}, **words)


def tasks_of(config: TrainConfig, mixers: Sequence[Mixer], folders: Sequence[Path] = ()) -> list[TaskDuring]:
    """The tasks that `loop.tasks` names, checked and built.

    Args:
        config: the words of the run.
        mixers: of its model, by layer.
        folders: searched for files of tasks after longmix's own, the first one that has a file counting.

    Raises:
        ConfigError: an unknown task, word or setting, an impossible value, or a task that cannot see this model.
    """
    found: list[TaskDuring] = []
    files = choices(folders)
    for number, item in enumerate(config.loop.tasks):
        one = _read(f"loop.tasks[{number}]", {TASK: item} if isinstance(item, str) else dict(item), files)
        if one.name in {other.name for other in found}:
            raise ConfigError(f"{one.key}: another task has the name {one.name}; give one of them {{name:x}}.")
        if not one.task.takes_leaky:
            refuse_leaky(mixers)
        _check_stride(one, config.seq_len)
        found.append(one)
    return found


def _read(key: str, item: Mapping[str, Any], names: Mapping[str, Path]) -> TaskDuring:
    chosen = item[TASK]
    if chosen not in names:
        meant = did_you_mean(nearest(str(chosen), names))
        raise ConfigError(f"{key}: there is no task {chosen}.{meant} Tasks are: {', '.join(names)}.")
    file: Any = OmegaConf.to_container(OmegaConf.load(names[chosen]), resolve=True)
    usual = defaults(TaskWords)
    words = {name: _whole(value) for name, value in item.items() if name in usual}
    own = {name: value for name, value in item.items() if name not in usual and name != TASK}
    allowed = list(settings(Choice.of(key, file).located()))
    for name in own:
        if name not in allowed:
            raise ConfigError(unknown_key(f"{key}.{name}", str(name), [TASK, *usual, *allowed]))
    missing = [name for name, value in (file | own).items() if value == "???"]
    if missing:
        raise ConfigError(f"no value was given for: {', '.join(f'{key}.{name}' for name in missing)}.")
    check_values(TaskWords, usual | words, f"{key}.")
    choice = Choice.of(key, file | own)
    choice.check(set(), Task)
    task = choice.build()
    if not task.follows_training:
        raise ConfigError(f"{key}: task={chosen} gives the same before and after training; use evaluate.py.")
    given = TaskWords(**(usual | words))
    if given.stride is not None and not task.takes_stride:
        raise ConfigError(f"{key}.stride={given.stride} has no effect on task={chosen}; leave it out.")
    return TaskDuring(key, given.name or str(chosen), task, given)


def _check_stride(one: TaskDuring, usual: int) -> None:
    """Refuse a stride beyond the shortest window; `usual` is the length that windows have without a word."""
    lengths = one.words.seq_len or usual
    shortest = min(lengths) if isinstance(lengths, list) else lengths
    if one.words.stride is not None:
        check_stride(one.words.stride, shortest, f"{one.key}.stride")


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def choices(folders: Sequence[Path] = ()) -> dict[str, Path]:
    """The file of every task by its name: those of longmix, then of the given folders, the first that has it."""
    files = (path for folder in (*reversed(folders), configs_folder()) for path in (folder / TASK).glob("*.yaml"))
    found = {path.stem: path for path in files}
    return dict(sorted(found.items()))


class TasksDuring:
    """Runs the tasks of a run.

    Args:
        config: the words of the run.
        tasks: see `tasks_of`.
        folder: of the run.
        report: shows a line on the terminal.
    """

    def __init__(
        self, config: TrainConfig, tasks: Sequence[TaskDuring], folder: Path, report: Callable[[str], None]
    ) -> None:
        self.config, self.tasks, self.folder, self.report = config, list(tasks), folder, report

    def are_due(self, step: int, last: int) -> bool:
        """Whether the validation after `step` of `last` steps has them. It depends on nothing but the step."""
        validations = self.config.loop.validate_every
        regular = validations is not None and step % (validations * self.config.loop.tasks_every) == 0
        return bool(self.tasks) and (regular or step == last)

    def measured(
        self,
        model: LanguageModel,
        part: StagePart,
        data: TrainingData,
        step: int,
        device: torch.device,
        precision: str,
        processes: Processes,
        goes_on: Callable[[], bool],
    ) -> Metrics | None:
        """The numbers of all tasks, as `task/NAME/...`; all processes must call it.

        A task that is refused, as for lack of text or memory, is reported; training goes on without its numbers.

        Args:
            model: in training; its weights may be divided over processes.
            part: the stage.
            data: of the stage.
            step: optimizer steps taken.
            device: where the model is.
            precision: of Lightning's trainer.
            processes: all that train.
            goes_on: asked after each task, in all processes at once.

        Returns:
            None if `goes_on` ended it.
        """
        metrics: Metrics = {}
        random = random_state.capture()
        try:
            with _as_evaluated(model, part, device) as evaluated, without_bars():
                restored = self._restored(evaluated, part, data, step, device, precision)
                for one in self.tasks:
                    subject = Subject(restored, data, one.config(data), self.folder)
                    try:
                        found = processes.each(functools.partial(_numbers_of, one, subject))[0]
                    except (Interrupted, ProcessLost):
                        raise
                    except LongmixError as error:
                        self.report(f"step {step}: {one.key} was left out: {error}")
                        found = {}
                    metrics |= found
                    self._show(one.name, step, found)
                    if not goes_on():
                        return None
        finally:
            random_state.restore(random)
        return metrics

    def _restored(
        self,
        model: LanguageModel,
        part: StagePart,
        data: TrainingData,
        step: int,
        device: torch.device,
        precision: str,
    ) -> Restored:
        own = part.config
        config = StoredConfig(
            mixer=own.mixer, model=own.model, data=own.data, tokenizer=own.tokenizer, seq_len=own.seq_len, seed=own.seed
        )
        kind = "bf16" if precision == "bf16-mixed" else "float32"
        return Restored(self.folder, step, plain(self.config), config, {}, model, data.tokenizer, device, kind)

    def _show(self, name: str, step: int, found: Metrics) -> None:
        shown = [f"{key.split('/', 2)[2]} {value:.4g}" for key, value in list(found.items())[:SHOWN]]
        if shown:
            self.report(f"step {step}  task {name}: {', '.join(shown)}")


def _numbers_of(one: TaskDuring, subject: Subject) -> Metrics:
    task = one.task
    place, room = settings_at(one.key, task.usual_place), allocation_errors(one.key, "give it shorter lengths.")
    with contextlib.redirect_stdout(io.StringIO()), place, room:  # the terminal is the progress bar's
        answer = task.ask(subject)
    return {f"{TASK}/{one.name}/{key}": float(value) for key, value in task.measures(answer).items()}


@contextlib.contextmanager
def _as_evaluated(model: LanguageModel, part: StagePart, device: torch.device) -> Iterator[LanguageModel]:
    """The model in evaluation mode, not compiled and whole; what is in training is the same afterwards."""
    if strategies.is_sharded(model):
        weights = {name: strategies.whole(weight) for name, weight in model.state_dict().items()}
        with torch.device(device):
            copy = build_model(part.config, model.vocab_size)
            begin(copy, part.config, None)  # with states to train it has more weights
        copy.load_state_dict(weights)
        yield copy.eval()
        return
    was_training, measured_hits = model.training, model.measures_hits
    compiled = {block: block._compiled_call_impl for block in model.blocks}
    gradients = {weight: weight.grad for weight in model.parameters()}
    try:
        for block in compiled:  # graphs for other shapes would count among those that training may have
            block._compiled_call_impl = None
        yield model.eval()
    finally:
        for block, call in compiled.items():
            block._compiled_call_impl = call
        for weight, gradient in gradients.items():
            weight.grad = gradient
        model.measures_hits = measured_hits
        model.train(was_training)
