"""`evaluate(config)`: from a checkpoint's folder to a table, a JSON file and a picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from longmix import config as configuration
from longmix.config import Node, build
from longmix.data.datamodule import TokenData
from longmix.errors import ConfigError
from longmix.model.backbone import LanguageModel
from longmix.restore import Restored, restore


@dataclass(frozen=True)
class Subject:
    """What a task evaluates, and how.

    Attributes:
        restored: the model and what came with it.
        data: gives batches of any split and length.
        words: the resolved words of `evaluate.py`.
        output: folder for results.
    """

    restored: Restored
    data: TokenData
    words: Node
    output: Path

    @property
    def model(self) -> LanguageModel:
        """The model, in evaluation mode."""
        return self.restored.model

    @property
    def step(self) -> int:
        """The checkpoint's step."""
        return self.restored.state["step"]

    def seq_lens(self) -> list[int]:
        """The context lengths asked for, shortest first."""
        asked = self.words["seq_len"]
        return [self.restored.config["seq_len"]] if asked is None else sorted(set(_as_list(asked)))


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Run the task of `config` on its checkpoint and return the results.

    Raises:
        LongmixError: see `longmix.errors`.
    """
    words = configuration.resolved(config)
    configuration.check_keys(words, configuration.EvaluateConfig)
    configuration.check(words["task"], "task", {"subject"})
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
    if not getattr(configuration.locate(words["task"]["_target_"], "task"), "takes_leaky", False):
        _refuse_leaky(model)
    home = _home(restored.checkpoint) if words["states"] is None else _folder(Path(words["states"]))
    output = Path(words["output"]) if words["output"] else home / "evaluation"
    subject = Subject(restored, data, words, output)
    return build(words["task"], "task", subject=subject)


def _home(checkpoint: Path) -> Path:
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _refuse_leaky(model: LanguageModel) -> None:
    for index, mixer in enumerate(model.mixers()):
        if mixer.leaky:
            setting = f"mixer.mode={mixer.mode}" if hasattr(mixer, "mode") else f"mixer {type(mixer).__name__}"
            raise ConfigError(
                f"the checkpoint was trained with {setting}, in which later tokens change what layer {index} computes "
                "for earlier ones: its loss is not that of a language model. Train with a causal mode or mixer."
            )


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_numbers(words: Node) -> None:
    for key in ("batch_size", "max_tokens"):
        if words[key] is not None and words[key] < 1:
            raise ConfigError(f"{key}={words[key]} must be at least 1.")
    lengths = words["seq_len"]
    if lengths is None:
        return
    if lengths == [] or any(type(length) is not int or length < 1 for length in _as_list(lengths)):
        raise ConfigError(f"seq_len={lengths!r} must be a whole number from 1, or a list of them.")
