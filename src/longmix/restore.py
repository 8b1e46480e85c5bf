"""Rebuilds a model from its checkpoint alone, for commands that do not train."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longmix.checkpoints import chosen_checkpoint
from longmix.checkpoints.contents import load_model_state, rebuilding
from longmix.config import Node
from longmix.data.tokens.tokenizers import Tokenizer, tokenizer_from_state
from longmix.errors import ConfigError
from longmix.model.backbone import LanguageModel
from longmix.model.build import model_from_checkpoint
from longmix.model.tuned_states_file import load_states
from longmix.trust import check_model_nodes

DEFAULTS: Node = {"states": None, "device": "auto", "precision": "auto", "trust": []}


@dataclass(frozen=True)
class Restored:
    """The content of a checkpoint, ready to use.

    Attributes:
        checkpoint: its folder.
        state: all that was saved but the optimizers.
        model: in evaluation mode, on `device`.
        tokenizer: the one it was trained with.
        device: where the model is.
        precision: "float32" or "bf16".
    """

    checkpoint: Path
    state: dict[str, Any]
    model: LanguageModel
    tokenizer: Tokenizer
    device: torch.device
    precision: str

    @property
    def config(self) -> Node:
        """The configuration it was trained with."""
        return self.state["config"]

    def autocast(self) -> AbstractContextManager:
        """The context of one forward pass."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()


def restore(words: Node | str | Path) -> Restored:
    """Rebuild the model that the words `checkpoint`, `states`, `device`, `precision` and `trust` describe.

    Args:
        words: of these, those that are absent have the entry points' defaults; or the checkpoint's folder, or that of
            its run, alone.

    Raises:
        ConfigError: a device or precision that there is not, or a checkpoint that names a class outside `trust`.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    given = words if isinstance(words, dict) else {"checkpoint": words}
    words = {**DEFAULTS, **given}
    device, precision = _place(words)
    checkpoint = chosen_checkpoint(words["checkpoint"])
    state = load_model_state(checkpoint)
    trained = state["config"]
    with rebuilding(checkpoint):
        check_model_nodes(trained, words["trust"])
        model = model_from_checkpoint(state)
        tokenizer = tokenizer_from_state(state["tokenizer"])
        if not 1 <= tokenizer.vocab_size <= model.vocab_size:
            raise ValueError(f"its tokenizer has {tokenizer.vocab_size:,} ids, and its model {model.vocab_size:,}")
    if words["states"] is not None:
        load_states(model, Path(words["states"]), trained)
    return Restored(checkpoint, state, model.to(device).eval(), tokenizer, device, precision)


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
