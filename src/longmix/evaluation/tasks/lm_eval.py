"""`evaluate.py task=lm_eval`: tasks of the lm-evaluation-harness, its own or local ones, on a model of longmix."""

import difflib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from longmix.data.tokens.ids import IdTokenizer
from longmix.data.tokens.tokenizers import NumberTokenizer
from longmix.errors import ConfigError, DataError
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task, numbers_in
from longmix.paths import user_path
from longmix.wording import counted, did_you_mean

BOOTSTRAPS = 1000
"""For standard errors of values that are no means, such as perplexities; the harness's own 100,000 take minutes."""

LONGEST_NAME = 80
"""The most letters of the tasks in a file's name."""


class LMEval(Task):
    """Tasks of the harness, with the standard errors of its values where it gives them.

    Most of its own tasks fetch their data. A task of yours is a YAML file in `include_path`; with `dataset_path: json`
    and `dataset_kwargs: {data_files: {test: FILE.jsonl}}` it needs no network.

    Args:
        tasks: name or names of tasks or groups.
        include_path: folder of further tasks.
        num_fewshot: examples in each context; None takes the task's own number.
        limit: examples of each task; None takes all.
        max_length: tokens of the longest context; None takes the trained length.
        seed: of few-shot examples and of sampling, where a task samples.

    Raises:
        ConfigError: the harness is not installed, or a setting is impossible.
    """

    reads_split = False

    def __init__(
        self,
        tasks: str | list[str],
        include_path: str | None = None,
        num_fewshot: int | None = None,
        limit: int | None = None,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        least = {"num_fewshot": (num_fewshot, 0), "limit": (limit, 1), "max_length": (max_length, 2), "seed": (seed, 0)}
        for name, (value, smallest) in least.items():
            if value is not None and value < smallest:
                raise ConfigError(f"task.{name}={value} must be at least {smallest}.")
        if not tasks:
            raise ConfigError("task.tasks is empty; name at least one task.")
        if include_path is not None:
            include_path = str(user_path("task.include_path", include_path))
            if not Path(include_path).is_dir():
                raise ConfigError(f"task.include_path={include_path} is not a folder.")
        self.tasks = [tasks] if isinstance(tasks, str) else tasks
        self.include_path, self.num_fewshot, self.limit = include_path, num_fewshot, limit
        self.max_length, self.seed = max_length, seed
        named = re.sub(r"[^\w.-]+", "-", "_".join(self.tasks), flags=re.ASCII)
        self.name = f"lm_eval_{named[:LONGEST_NAME]}"

    def ask(self, subject: Subject) -> Answer:
        """Run the harness's tasks.

        Returns:
            `{"step", "precision", "max_length", "num_fewshot", "limit", "seed", "harness", "results": {task: {metric:
            value}}, "examples": {task: number}, "versions": {task: version}}`

        Raises:
            ConfigError: there is no such task, or the model is not one of text.
            DataError: the data of a task are not there, or cannot be fetched.
        """
        if isinstance(subject.restored.tokenizer, NumberTokenizer):
            raise ConfigError("task=lm_eval needs a model of text, and this one was trained on a synthetic task.")
        if isinstance(subject.restored.tokenizer, IdTokenizer):
            raise ConfigError("task=lm_eval needs a tokenizer, and this model's tokens have none.")
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError("task=lm_eval needs the lm-evaluation-harness; pip install 'longmix[lm-eval]' brings it.")
        length = subject.trained_seq_len if self.max_length is None else self.max_length
        found = self._evaluated(subject, length)
        settings: dict[str, Any] = {
            "max_length": length,
            "num_fewshot": self.num_fewshot,
            "limit": self.limit,
            "seed": self.seed,
        }
        settings |= {"harness": importlib.metadata.version("lm_eval")}
        report = {
            "step": subject.step,
            "precision": subject.restored.precision,
            **settings,
            "results": {task: _values(metrics) for task, metrics in found["results"].items()},
            "examples": {task: count["effective"] for task, count in found["n-samples"].items()},
            "versions": found["versions"],
        }
        return Answer(report, {**settings, "tasks": self.tasks, "include_path": self.include_path})

    def measures(self, answer: Answer) -> dict[str, float]:
        """The numbers that training logs: the harness's results, as TASK/METRIC."""
        return numbers_in(answer.report["results"])

    def _evaluated(self, subject: Subject, length: int) -> dict[str, Any]:
        from lm_eval.evaluator import simple_evaluate

        from longmix.evaluation.tasks.harness import HarnessModel

        manager = _manager(self.tasks, self.include_path)
        try:
            found = simple_evaluate(
                HarnessModel(subject, length, self.seed),
                tasks=self.tasks,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=BOOTSTRAPS,
                random_seed=self.seed,
                numpy_random_seed=self.seed,
                torch_random_seed=self.seed,
                fewshot_random_seed=self.seed,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
            )
        except OSError as error:  # of the network, the hub, or a file that is not there
            raise DataError(f"task.tasks={self.tasks} cannot get their data: {error}") from error
        assert found is not None  # only other processes than the first get nothing
        return found

    def tables(self, answer: Answer) -> Iterator[Table]:
        """Values of each task."""
        yield _table(answer.report)


def _manager(tasks: list[str], include_path: str | None) -> Any:
    """The harness's index of tasks. Its own tasks are indexed, which is slow, only if the folder lacks one."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        local = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(local.all_tasks):
            return local
    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ConfigError(f"task.tasks: the harness has no task {name!r}.{did_you_mean(' or '.join(close))}")
    return manager


def _values(metrics: dict[str, Any]) -> dict[str, float]:
    """The harness's `metric,filter` as `metric`, or `metric (filter)` where the filter is one."""
    values = {}
    for key, value in metrics.items():
        name, _, filtered = key.partition(",")
        if filtered and isinstance(value, int | float):
            values[name if filtered == "none" else f"{name} ({filtered})"] = float(value)
    return values


def _table(report: dict[str, Any]) -> Table:
    table = Table(
        title=f"lm-evaluation-harness {report['harness']}, contexts of up to {counted(report['max_length'], 'token')}"
    )
    for column in ("task", "metric", "value", "+-", "examples"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task, values in report["results"].items():
        for metric, value in values.items():
            name, _, filtered = metric.partition(" ")
            if name.endswith("_stderr"):
                continue
            error = values.get(f"{name}_stderr {filtered}".strip())
            shown = "" if error is None else f"{error:.4f}"
            table.add_row(task, metric, f"{value:.4f}", shown, str(report["examples"].get(task, "")))
    return table
