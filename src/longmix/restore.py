"""Rebuilds a model from its checkpoint alone, for commands that do not train."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longmix.checkpoints import chosen_checkpoint
from longmix.checkpoints.contents import Weights, load_model_state, rebuilding
from longmix.checkpoints.verify import weights_digest
from longmix.config import EvaluateConfig, GenerateConfig, Plain, StoredConfig
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.errors import ConfigError
from longmix.files import sha256_of_json
from longmix.model.backbone import LanguageModel
from longmix.model.build import model_from_checkpoint
from longmix.model.changes import changed_mixer
from longmix.model.tuned_states_file import load_states
from longmix.notices import notice_float32_on_gpu
from longmix.trust import check_model_nodes


@dataclass(frozen=True)
class Restored:
    """The content of a checkpoint, ready to use.

    Attributes:
        checkpoint: its folder.
        step: of the run that saved it.
        written: the configuration it was trained with, as the checkpoint holds it.
        config: the configuration it was trained with, as far as every version wrote it, with the mixer as it is used.
        changes: settings of the mixer that are not those of the training.
        model: in evaluation mode, on `device`.
        tokenizer: the one it was trained with.
        device: where the model is.
        precision: "float32" or "bf16".
        weights: "trained" or "ema".
        states: digest of the trained states of another file that documents begin from; None without one.
    """

    checkpoint: Path
    step: int
    written: Plain
    config: StoredConfig
    changes: Mapping[str, Any]
    model: LanguageModel
    tokenizer: Tokenizer
    device: torch.device
    precision: str
    weights: Weights = "trained"
    states: str | None = None

    def digest(self) -> str:
        """A digest of the checkpoint's files and of which of its weights these are.

        The digests of the files stand in the checkpoint and were verified as it was loaded: no weight is read again.
        """
        of_files = weights_digest(self.checkpoint)
        return of_files if self.weights == "trained" else sha256_of_json([of_files, self.weights])

    def autocast(self) -> AbstractContextManager:
        """The context of one forward pass."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def restored_for(config: EvaluateConfig | GenerateConfig) -> Restored:
    """Rebuild the model that the words of a command name; see `restore`."""
    return restore(
        config.checkpoint,
        mixer=config.mixer,
        states=config.states,
        weights=config.weights,
        device=config.device,
        precision=config.precision,
        trust=config.trust,
    )


def restore(
    checkpoint: str | Path,
    *,
    mixer: Mapping[str, Any] | None = None,
    states: str | Path | None = None,
    weights: Weights = "trained",
    device: str = "auto",
    precision: str = "auto",
    trust: Collection[str] = (),
) -> Restored:
    """Rebuild a model from its checkpoint.

    Args:
        checkpoint: its folder, or that of its run.
        mixer: settings of its mixer that may change after training, with their values; by members for a pattern.
        states: file of trained states that documents begin from, or the folder of the run that wrote it.
        weights: "trained", or "ema" for their average over the steps.
        device: auto, cpu or cuda.
        precision: auto, float32 or bf16.
        trust: full names of classes besides longmix's own that the checkpoint may name.

    Raises:
        ConfigError: a device or precision that there is not, a setting that may not change, or a checkpoint that names
            a class outside `trust`.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    on, precision = _device_and_precision(device, precision)
    folder = chosen_checkpoint(checkpoint)
    state = load_model_state(folder, weights)
    with rebuilding(folder):
        check_model_nodes(state["config"], trust)
        trained = StoredConfig.of(state["config"])
    config = replace(trained, mixer=changed_mixer(trained.mixer, mixer or {}, f"checkpoint={checkpoint}"))
    with rebuilding(folder):
        model = model_from_checkpoint(state, config)
        tokenizer = tokenizer_from_state(state["tokenizer"])
        if not 1 <= tokenizer.vocab_size <= model.vocab_size:
            raise ValueError(f"its tokenizer has {tokenizer.vocab_size:,} ids, and its model {model.vocab_size:,}")
    of_states = None if states is None else load_states(model, Path(states), trained)
    model = model.to(on).eval()
    return Restored(
        *(folder, state["step"], state["config"], config, dict(mixer or {}), model, tokenizer, on, precision),
        weights=weights,
        states=of_states,
    )


def _device_and_precision(device: str, precision: str) -> tuple[torch.device, str]:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={device!r} is not one of auto, cpu, cuda.")
    if precision not in ("auto", "float32", "bf16"):
        raise ConfigError(f"precision={precision!r} is not one of auto, float32, bf16.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device; use device=cpu.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and precision == "float32":
        notice_float32_on_gpu("precision=float32", "precision=bf16")
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "float32"
    return torch.device(device), precision
