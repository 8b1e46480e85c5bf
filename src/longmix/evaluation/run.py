"""`evaluate(config)`: from a checkpoint's folder to tables, JSON files and pictures."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from longmix import config as configuration
from longmix.config import Node, build
from longmix.errors import ConfigError
from longmix.evaluation.subject import Subject
from longmix.model.backbone import LanguageModel
from longmix.restore import restore


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Run the tasks of `config` on its checkpoint and return the report of each by its name.

    Raises:
        LongmixError: see `longmix.errors`.
    """
    words = configuration.resolved(config)
    configuration.check_keys(words, configuration.EvaluateConfig)
    tasks = _checked_tasks(words["task"])
    _check_numbers(words)
    restored = restore(words)
    model, trained = restored.model, restored.config
    data = build(
        words["data"] or trained["data"],
        "data",
        tokenizer=restored.tokenizer,
        seq_len=trained["seq_len"],
        batch_size=1,
        seed=trained["seed"],
    )
    for task in tasks.values():
        if not _takes_leaky(task):
            _refuse_leaky(model)
    home = _home(restored.checkpoint) if words["states"] is None else _folder(Path(words["states"]))
    output = Path(words["output"]) if words["output"] else home / "evaluation"
    subject = Subject(restored, data, words, output)
    return {name: build(task, f"task.{name}", subject=subject) for name, task in tasks.items()}


def _checked_tasks(tasks: Any) -> dict[str, Node]:
    """The tasks by name; every one is checked before the first begins."""
    if not isinstance(tasks, dict) or not tasks or "_target_" in tasks:
        raise ConfigError(f"task={tasks!r} is no task; give one or several, such as task=[loss,accuracy].")
    for name, task in tasks.items():
        configuration.check(task, f"task.{name}", {"subject"})
    return tasks


def _home(checkpoint: Path) -> Path:
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _takes_leaky(task: Node) -> bool:
    """Whether a task's figures are right of a model in which later tokens change earlier outputs; settings may say."""
    takes = getattr(configuration.locate(task["_target_"], "task"), "takes_leaky", False)
    return takes(task) if callable(takes) else takes


def _refuse_leaky(model: LanguageModel) -> None:
    for index, mixer in enumerate(model.mixers()):
        if mixer.leaky:
            setting = f"mixer.mode={mixer.mode}" if hasattr(mixer, "mode") else f"mixer {type(mixer).__name__}"
            raise ConfigError(
                f"the checkpoint was trained with {setting}, in which later tokens change what layer {index} computes "
                "for earlier ones: its loss is not that of a language model. Train with a causal mode or mixer; or "
                "task.loss.prefixes=64 runs the tokens before some targets on their own, which is honest."
            )


def _check_numbers(words: Node) -> None:
    for key in ("batch_size", "max_tokens"):
        if words[key] is not None and words[key] < 1:
            raise ConfigError(f"{key}={words[key]} must be at least 1.")
    lengths = words["seq_len"]
    if lengths is None:
        return
    listed = lengths if isinstance(lengths, list) else [lengths]
    if not listed or any(type(length) is not int or length < 1 for length in listed):
        raise ConfigError(f"seq_len={lengths!r} must be a whole number from 1, or a list of them.")
