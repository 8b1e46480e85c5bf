"""`evaluate(config)`: from a checkpoint's folder to a table, a JSON file and a picture."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from longmix import config as configuration
from longmix.checkpoints import find_checkpoint, load_checkpoint
from longmix.config import Node, build, refuse_untrusted
from longmix.data.datamodule import TokenData
from longmix.data.tokenizers import tokenizer_from_state
from longmix.errors import ConfigError
from longmix.model.backbone import LanguageModel
from longmix.model.build import model_from_checkpoint
from longmix.model.states import load_states


@dataclass(frozen=True)
class Subject:
    """What a task evaluates, and how.

    Attributes:
        model: in eval mode, on `device`.
        data: gives batches of any split and length.
        trained_config: the configuration the model was trained with.
        step: the checkpoint's step.
        device: where the model is.
        precision: "float32" or "bf16".
        words: the resolved words of `evaluate.py`.
        output: existing folder for results.
    """

    model: LanguageModel
    data: TokenData
    trained_config: Node
    step: int
    device: torch.device
    precision: str
    words: Node
    output: Path

    def autocast(self) -> AbstractContextManager:
        """The context of one forward pass."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def seq_lens(self) -> list[int]:
        """The context lengths asked for, shortest first."""
        asked = self.words["seq_len"]
        return [self.trained_config["seq_len"]] if asked is None else sorted(set(_as_list(asked)))


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Run the task of `config` on its checkpoint and return the results.

    Raises:
        LongmixError: see `longmix.errors`.
    """
    words = configuration.resolved(config)
    configuration.check_keys(words, configuration.EvaluateConfig)
    configuration.check(words["task"], "task", {"subject"})
    _check_numbers(words)
    device, precision = _place(words)
    checkpoint = find_checkpoint(Path(words["checkpoint"]))
    state = load_checkpoint(checkpoint)
    trained = state["config"]
    refuse_untrusted({key: trained[key] for key in ("model", "mixer", "data")}, "config", {"longmix", *words["trust"]})
    data = build(
        words["data"] or trained["data"],
        "data",
        tokenizer=tokenizer_from_state(state["tokenizer"]),
        seq_len=trained["seq_len"],
        batch_size=1,
        seed=trained["seed"],
    )
    model = model_from_checkpoint(state)
    if words["states"] is not None:
        load_states(model, Path(words["states"]), trained)
    model = model.to(device).eval()
    if not getattr(configuration.locate(words["task"]["_target_"], "task"), "takes_leaky", False):
        _refuse_leaky(model)
    home = _home(checkpoint) if words["states"] is None else _folder(Path(words["states"]))
    output = Path(words["output"]) if words["output"] else home / "evaluation"
    subject = Subject(model, data, trained, state["step"], device, precision, words, output)
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


def _place(words: Node) -> tuple[torch.device, str]:
    device, precision = words["device"], words["precision"]
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={device!r} is not one of auto, cpu, cuda.")
    if precision not in ("auto", "float32", "bf16"):
        raise ConfigError(f"precision={precision!r} is not one of auto, float32, bf16.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device; use device=cpu.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "float32"
    return torch.device(device), precision
