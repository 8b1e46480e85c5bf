"""Begins training from a checkpoint's weights: trains all of them, or only the states before documents."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longmix.checkpoints import CheckpointStore, chosen_checkpoint
from longmix.checkpoints.contents import load_model_state, rebuilding
from longmix.checkpoints.find import LAST, last_checkpoint
from longmix.checkpoints.verify import weights_digest
from longmix.config import Node
from longmix.data.tokens.tokenizers import Tokenizer, tokenizer_from_state
from longmix.distributed.agreement import Processes
from longmix.distributed.ranks import was_restarted
from longmix.errors import CheckpointError, ConfigError
from longmix.invocation import Invocation
from longmix.model.backbone import LanguageModel
from longmix.model.tuned_states_file import load_weights, tune_states
from longmix.training.identity import ORIGIN
from longmix.trust import check_model_nodes

TAKEN = ("mixer", "model", "tokenizer")
"""Nodes of the configuration that are taken from the checkpoint."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint to begin from. A run that continues for certain uses its own, as the first may be gone.

    Attributes:
        state: its content without the optimizers.
        tokenizer: the one it was trained with.
        record: which checkpoint the command line names, as `config.yaml` keeps it: its folder as `checkpoint`, and the
            digest of its `weights`; None if there is none any more.
    """

    state: dict[str, Any]
    tokenizer: Tokenizer
    record: dict[str, str] | None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; imported models may have more than their tokenizer has ids."""
        return self.state["model"]["embedding.weight"].shape[0]

    @classmethod
    def of(cls, node: Node, invocation: Invocation) -> "Origin | None":
        """What `node["checkpoint"]` names; model, mixer and tokenizer in `node` are replaced by the checkpoint's.

        `node["origin"]` becomes the record, for runs to be told apart whose `checkpoint` is the same word.

        Raises:
            CheckpointError: there is none, or it is damaged.
            ConfigError: the command line also says what comes from the checkpoint.
        """
        node.pop(ORIGIN, None)  # of a run's config.yaml that was given as a configuration
        if node["checkpoint"] is None:
            return None
        for override in invocation.words:
            word = override.lstrip("+~").partition("=")[0]
            if word.split(".")[0] in (*TAKEN, "block"):
                raise ConfigError(f"{word} comes from checkpoint={node['checkpoint']}; leave one of the two out.")
        own = continued_checkpoint(node, invocation)
        state = None if own is None else load_model_state(own)
        if node["checkpoint"] == LAST:  # the configuration that is kept names the run itself
            began = None if state is None else state["config"].get("checkpoint")
            node["checkpoint"] = str(began or chosen_checkpoint(LAST, invocation.folder))
        try:
            named = chosen_checkpoint(node["checkpoint"])
            record = {"checkpoint": str(named.absolute()), "weights": weights_digest(named)}
        except CheckpointError:
            if own is None:
                raise
            named, record = own, None
        checkpoint = own or named
        state = load_model_state(checkpoint) if state is None else state
        trained = state["config"]
        with rebuilding(checkpoint):
            check_model_nodes(trained, node["trust"])
            node.update({key: trained[key] for key in TAKEN} | {ORIGIN: record})
            return cls(state, tokenizer_from_state(state["tokenizer"]), record)

    def check_same(self, processes: Processes) -> None:
        """Refuse to begin if processes read different weights, because the run there was still training.

        Raises:
            CheckpointError: names checkpoints that do not change; the same in all processes, which must all call it.
        """
        records = processes.each(lambda: self.record)
        found = sorted({record["checkpoint"] for record in records if record is not None})
        if any(record != records[0] for record in records):
            raise CheckpointError(
                f"the run that checkpoint= names went on while the processes began: they found {' and '.join(found)}. "
                f"Give one of its checkpoints, such as checkpoint={found[-1]}."
            )


def continued_checkpoint(node: Node, invocation: Invocation) -> Path | None:
    """The checkpoint that this command continues for certain; None if it may begin a new run.

    That checkpoint holds model, mixer, tokenizer and weights.
    """
    resume = node["resume"]
    if resume == LAST:
        return last_checkpoint()
    if resume not in (None, "auto"):
        return chosen_checkpoint(resume)
    if invocation.in_sweep or not (resume == "auto" or was_restarted()):
        return None
    return CheckpointStore(invocation.folder / "checkpoints").latest()


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
