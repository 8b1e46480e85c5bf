"""The contract of the tasks of `evaluate.py`: settings in; then ask a model, report, show tables, draw, save."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from matplotlib.figure import Figure
from rich.console import Console, RenderableType

from longmix.config import settings
from longmix.evaluation.subject import Subject

HEADING = ("split", "step", "trained_seq_len", "precision")
"""Entries of a report that say what was evaluated; see `Subject.heading`."""


@dataclass(frozen=True)
class Answer:
    """The findings of a task about a model.

    Attributes:
        report: the results, JSON-able.
        settings: what decided the results besides the model, the data and the split; None takes the settings of the
            task and the words `seq_len` and `max_tokens`. Two results with equal ones are one and the same.
        shown: what the tables or the picture need besides the report, such as matrices; it is not kept.
    """

    report: dict[str, Any]
    settings: dict[str, Any] | None = None
    shown: Any = None


class Task(ABC):
    """Base of the tasks. A subclass is one file; `task=NAME` builds it from the settings in `configs/task/NAME.yaml`.

    The arguments of the constructor are the settings. It refuses those that no model could take, with messages that
    call them `task.NAME_OF_SETTING`, and keeps each as the attribute of its name. Then `run` asks, shows and saves.

    Attributes:
        name: names of its result files begin with it.
        takes_leaky: its results are right also of a model in which later tokens change earlier outputs.
        follows_training: its results change while a model learns, so that `loop.tasks` may have it.
        takes_stride: it reads the windows of the split as `Subject.batches` gives them, which may overlap.
        reads_split: its results depend on data and split, which the results then name.
        usual_place: what its messages call its settings by; with the task's own name in its place the user reads them.
    """

    name: str
    takes_leaky = False
    takes_stride = False
    follows_training = True
    reads_split = True
    usual_place: ClassVar[str] = "task"

    @abstractmethod
    def ask(self, subject: Subject) -> Answer:
        """Run the model and return the findings.

        Args:
            subject: the model, its data, and the words of the command line.

        Raises:
            ConfigError: a setting that this model or machine cannot take.
            DataError: the split does not have what is asked for.
        """

    @abstractmethod
    def tables(self, answer: Answer) -> Iterable[RenderableType]:
        """The output on the terminal: tables, and lines of text that are not wrapped."""

    def figure(self, answer: Answer) -> Figure | None:
        """The picture beside the report; None, the default, for no picture."""
        return None

    def measures(self, answer: Answer) -> dict[str, float]:
        """The numbers that training logs of it, by name: those of the report, without lists.

        A number within `lengths` is named after its measure first, such as `loss/4096`.
        """
        report = {key: value for key, value in answer.report.items() if key not in HEADING}
        by_length = report.pop("lengths", {})
        numbers = numbers_in(report)
        for length, found in by_length.items():
            numbers |= {f"{name}/{length}": value for name, value in numbers_in(found).items()}
        return numbers

    def save(self, subject: Subject, answer: Answer) -> None:
        """Write the report as JSON and the picture as PNG into the folder for results.

        Raises:
            StorageError: they cannot be written.
        """
        subject.save(self.name, answer.report, self.figure(answer), self.used(subject, answer), self.reads_split)

    def used(self, subject: Subject, answer: Answer) -> dict[str, Any]:
        """The settings that decided the results, see `Answer.settings`."""
        if answer.settings is not None:
            return answer.settings
        own = {name: getattr(self, name) for name in settings(type(self))}
        words = {"seq_len": subject.seq_lens(), "max_tokens": subject.config.max_tokens}
        return {**own, **words, **subject.stride_used()}

    def run(self, subject: Subject) -> dict[str, Any]:
        """Ask, print the tables, save, and return the report.

        Raises:
            ConfigError, DataError: see `ask`.
            StorageError: see `save`.
        """
        answer = self.ask(subject)
        console = Console()
        for table in self.tables(answer):
            console.print(table, soft_wrap=isinstance(table, str))
        self.save(subject, answer)
        return answer.report


def numbers_in(nested: Mapping[Any, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in nested dicts, with names joined by "/"; texts, switches, lists and what is null are left out."""
    found: dict[str, float] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= numbers_in(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{key}"] = value
    return found
