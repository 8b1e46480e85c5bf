"""Training that begins from the weights of a checkpoint: all of them on other data, or its initial states alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from longmix.checkpoints import chosen_checkpoint
from longmix.checkpoints.contents import load_model_state, rebuilding
from longmix.checkpoints.last import LAST
from longmix.config import Node
from longmix.data.tokenizers import Tokenizer, tokenizer_from_state
from longmix.errors import ConfigError
from longmix.model.backbone import LanguageModel
from longmix.model.states import load_weights, tune_states
from longmix.trust import check_model_nodes

TAKEN = ("mixer", "model", "tokenizer")
"""The nodes of the configuration that come from the checkpoint."""


@dataclass(frozen=True)
class Origin:
    """A checkpoint to begin from.

    Attributes:
        state: what is in it but the optimizers.
        tokenizer: the one it was trained with.
    """

    state: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; imported models may have more than their tokenizer has ids."""
        return self.state["model"]["embedding.weight"].shape[0]

    @classmethod
    def of(cls, node: Node) -> "Origin | None":
        """What `node["checkpoint"]` names; model, mixer and tokenizer in `node` are replaced by the checkpoint's.

        Raises:
            CheckpointError: there is none, or it is damaged.
            ConfigError: the command line also says what comes from the checkpoint, or `trainable` is wrong.
        """
        if node["trainable"] not in ("all", "states"):
            raise ConfigError(f"trainable={node['trainable']!r} is not one of all, states.")
        for key, value in node["tuning"].items():
            if value < 0:
                raise ConfigError(f"tuning.{key}={value} must be at least 0.")
        if node["checkpoint"] is None:
            return None
        for override in HydraConfig.get().overrides.task:
            word = override.lstrip("+~").partition("=")[0]
            if word.split(".")[0] in (*TAKEN, "block"):
                raise ConfigError(f"{word} comes from checkpoint={node['checkpoint']}; leave one of the two out.")
        if node["checkpoint"] == LAST:  # the configuration that is kept names the run itself
            node["checkpoint"] = str(chosen_checkpoint(LAST, Path(HydraConfig.get().runtime.output_dir)))
        checkpoint = chosen_checkpoint(node["checkpoint"])
        state = load_model_state(checkpoint)
        trained = state["config"]
        with rebuilding(checkpoint):
            check_model_nodes(trained, node["trust"])
            node.update({key: trained[key] for key in TAKEN})
            return cls(state, tokenizer_from_state(state["tokenizer"]))


def begin(model: LanguageModel, node: Node, origin: Origin | None) -> None:
    """Load the weights of the origin, and with `trainable=states` train nothing but states before documents.

    Raises:
        ConfigError: there are no such states in the model.
    """
    if origin is not None:
        load_weights(model, origin.state["model"])
    if node["trainable"] == "states":
        states = set(tune_states(model, **node["tuning"]))
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in states)
