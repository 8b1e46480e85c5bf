"""Checks of a checkpoint's content before a model is built from it: every key, types, and sizes that fit.

A file whose hash is right may still be of another program, or made by hand. Looked at once, here, it is one error that
names the checkpoint, and not whatever the code that uses it would stumble over.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from torch import Tensor

from longmix.checkpoints.load import load_checkpoint
from longmix.checkpoints.store import SKIPS_IN_A_ROW
from longmix.checkpoints.tensors import AVERAGED
from longmix.checkpoints.verify import check_weight, reason_of
from longmix.config import STAGES, reached
from longmix.errors import CheckpointError, LongmixError, NonFiniteError
from longmix.reading import shortened

CONFIG_KEYS = ("model", "mixer", "data", "tokenizer", "seq_len", "seed")
LONGEST_MESSAGE = 900
DEEPEST = 50
"""The most levels of a configuration; longmix's have about ten."""


class ModelState(TypedDict):
    """The entries of a checkpoint that a model is rebuilt from; there are more, of which versions may be missing.

    Attributes:
        step: of the run that saved it.
        config: the configuration it was trained with, as dicts.
        tokenizer: its state.
        model: the weights by name.
        versions: of the packages that wrote it.
    """

    step: int
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    model: dict[str, Tensor]
    versions: NotRequired[dict[str, str]]


Weights = Literal["trained", "ema"]
"""Which weights of a checkpoint: those of its step, or their average over the steps (`loop.ema_decay`)."""


def load_model_state(checkpoint: Path | str, weights: Weights = "trained") -> ModelState:
    """The state in a checkpoint without the optimizers; it holds all that a model is rebuilt from.

    Its configuration is that of the stage in which it was saved.

    Args:
        checkpoint: its folder.
        weights: which.

    Raises:
        CheckpointError: a file is missing or damaged, the checkpoint is not of a model, or has no averaged weights.
    """
    state = load_checkpoint(checkpoint, optimizers=False, averaged=weights == "ema")
    with rebuilding(checkpoint):
        if weights == "ema":
            state["model"] = _averaged(checkpoint, state)
        check_model_state(state)
        if state["config"].get(STAGES):
            state["config"] = reached(state["config"])
            check_model_state(state)
    return cast(ModelState, state)


def _averaged(checkpoint: Path | str, state: dict[str, Any]) -> dict[str, Any]:
    """The weights of a state with their averages in the place of those that have one."""
    if AVERAGED not in state:
        raise CheckpointError(
            f"{checkpoint} has no averaged weights, so weights=ema cannot be had: its run had no loop.ema_decay, or it "
            "is an import or a mean, which have one set of weights."
        )
    own, averages = _is_dict(state, "model"), _is_dict(state, AVERAGED)
    for name, average in averages.items():
        check_weight(name, average)
        if name not in own or own[name].shape != average.shape:
            raise ValueError(f"its average of {name} is that of no weight")
    return own | {name: average.to(own[name].dtype) for name, average in averages.items()}


def check_model_state(state: dict[str, Any]) -> None:
    """Refuse a state that lacks an entry from which a model is rebuilt; call inside `rebuilding`.

    Raises:
        ValueError: names the entry.
    """
    _check_counts(state, {"step": 0})
    _is_dict(state, "tokenizer")
    config = _is_dict(state, "config")
    lacking = [key for key in CONFIG_KEYS if key not in config]
    if lacking:
        raise ValueError(f"its config lacks {', '.join(lacking)}")
    _check_node(config, "config", 0)
    model, _ = _is_dict(config, "model"), _is_dict(config, "mixer")
    _check_counts(config, {"seq_len": 1, "seed": 0})
    weights = _is_dict(state, "model")
    embedding = weights.get("embedding.weight")
    if not isinstance(embedding, Tensor) or embedding.ndim != 2 or 0 in embedding.shape:
        raise ValueError("it has no embedding.weight of two dimensions")
    _check_sizes(model, weights, embedding)


def check_run_state(state: dict[str, Any]) -> None:
    """Refuse a state that lacks an entry, besides weights, from which training continues; call inside `rebuilding`.

    Raises:
        ValueError: names the entry.
    """
    config = _is_dict(state, "config")
    _check_node(config, "config", 0)
    for key in ("run", "data_fingerprint"):
        _is_dict(state, key)
    _check_counts(state, {"step": 0, "steps_skipped": 0})
    if SKIPS_IN_A_ROW in state:
        _check_counts(state, {SKIPS_IN_A_ROW: 0})
    if "ema_updates" in state:
        _check_counts(state, {"ema_updates": 0})
    if "spikes" in state:
        _check_pairs(state["spikes"], "spikes")
    randoms = state.get("random")
    randoms = randoms if isinstance(randoms, list) else [randoms]
    if not randoms or not all(isinstance(one, dict) for one in randoms):
        raise ValueError("its random is no list of states")
    optimizers = state.get("optimizers")
    if not isinstance(optimizers, list):
        raise ValueError("its optimizers is no list")
    for optimizer in optimizers:
        groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
        if not isinstance(groups, list) or not isinstance(optimizer.get("state"), dict):
            raise ValueError("its optimizers are no optimizers")
        if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
            raise ValueError("its optimizers have no groups of parameters")


@contextlib.contextmanager
def rebuilding(checkpoint: Path | str) -> Iterator[None]:
    """Name the checkpoint in any error raised while something is built from its content.

    Raises:
        CheckpointError: for errors that only a content of the wrong kind causes.
        LongmixError: of the same kind, with the checkpoint's name.
    """
    try:
        yield
    except NonFiniteError:
        raise
    except LongmixError as error:
        text = shortened(error, LONGEST_MESSAGE)
        if str(checkpoint) not in text:
            text = f"{checkpoint}: {text}"
        if text == str(error):
            raise
        raise type(error)(text) from error
    except Exception as error:  # a foreign content can raise any kind
        raise CheckpointError(
            f"{checkpoint} holds no model that longmix can use ({reason_of(error)}). Give another checkpoint."
        ) from error


def _is_dict(node: dict[str, Any], key: str) -> dict[str, Any]:
    value = node.get(key)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"its {key} is {_short(value)}" if key in node else f"it has no {key}")
    return value


def _check_counts(node: dict[str, Any], least: dict[str, int]) -> None:
    for key, smallest in least.items():
        value = node.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise ValueError(f"its {key} is {_short(value)}")


def _check_pairs(value: Any, key: str) -> None:
    """Refuse what is not two lists of as many numbers."""
    lists = value if isinstance(value, list) and len(value) == 2 else []
    if not lists or not all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
        raise ValueError(f"its {key} are no two lists of one length")
    if not all(isinstance(number, float) and math.isfinite(number) for one in lists for number in one):
        raise ValueError(f"its {key} are no numbers")


def _check_node(value: Any, key: str, depth: int) -> None:
    """Refuse a configuration with values that YAML cannot hold."""
    if depth > DEEPEST:
        raise ValueError(f"its {key} is nested too deeply")
    if isinstance(value, dict):
        for name, part in value.items():
            if not isinstance(name, str):
                raise ValueError(f"its {key} has a key {_short(name)}")
            _check_node(part, f"{key}.{name}", depth + 1)
    elif isinstance(value, list | tuple):
        for part in value:
            _check_node(part, key, depth + 1)
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"its {key} is a {type(value).__name__}")


def _check_sizes(model: dict[str, Any], weights: dict[str, Any], embedding: Tensor) -> None:
    """Refuse sizes that differ from those of the weights, before any memory is allocated."""
    blocks = {match[1] for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    for key, found in (("num_layers", len(blocks)), ("d_model", embedding.shape[1])):
        if isinstance(model.get(key), int) and model[key] != found:
            raise ValueError(f"its config says model.{key}={_short(model[key])}, and its weights are of {found}")


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) < 60 else f"{text[:60]}..."
