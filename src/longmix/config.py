"""The configuration's types, and the checks that run before any work.

The top-level words and the loop's settings are dataclasses: Hydra refuses unknown keys and wrong types there by itself.
A group's node names a class or function with `_target_`; its schema is that callable's signature, so adding a mixer or
a corpus means writing one class and one YAML file and nothing else.
"""

import difflib
import functools
import importlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longmix.aliases import path_now
from longmix.errors import ConfigError, settings_at
from longmix.naming import check_name

Node = dict[str, Any]

LARGEST_INTEGER = 2**63 - 1
"""What torch and NumPy take."""

PLAIN_MODULES = ("builtins", "pathlib", "typing", "types", "collections.abc")
"""Classes from these are values, which no node stands for."""

LARGEST_SEED = 2**32 - 1
"""What NumPy's global generator takes."""


@dataclass
class LoopConfig:
    """Settings of the training loop that are the same on every machine.

    Attributes:
        gradient_clip: largest allowed norm of the whole gradient; null never clips.
        log_every: steps between log rows.
        validate_every: steps between validations; null validates at the end only.
        checkpoint_every: steps between checkpoints; null saves at the end only.
        keep_checkpoints: how many checkpoints stay beside the best one.
        sharded_checkpoints: each process writes what it has; false: the first all of it to one file; null: with fsdp.
        async_checkpoints: write while training goes on, which waits for a copy in CPU memory only.
        nonfinite: what a non-finite loss or gradient does: "stop" the run, or "skip" that step and count it.
        max_skips: the run stops all the same when so many steps in a row were skipped.
    """

    gradient_clip: float | None = 1.0
    log_every: int = 10
    validate_every: int | None = 100
    checkpoint_every: int | None = 100
    keep_checkpoints: int = 2
    sharded_checkpoints: bool | None = None
    async_checkpoints: bool = False
    nonfinite: str = "stop"
    max_skips: int = 20


LOOP_COUNTS = ("log_every", "validate_every", "checkpoint_every", "keep_checkpoints", "max_skips")
"""Settings of the loop that are at least 1, where they are not null."""


@dataclass
class TuningConfig:
    """What `trainable=states` trains besides the states; see `longmix.mixers.parts.state_tuning`.

    Attributes:
        features: size of a memory that each head reads through kernel features; 0 for none.
        decorrelation: how fast these features are made uncorrelated; 0 leaves them.
    """

    features: int = 0
    decorrelation: float = 0.0


@dataclass
class MatchConfig:
    """Models of equal size whatever the mixer; see `longmix.model.matching`.

    Attributes:
        parameters: of the whole model; `model.mlp_hidden` is chosen to come nearest. null leaves it.
        tolerance: largest relative difference that is accepted.
        multiple: `model.mlp_hidden` is a multiple of it.
    """

    parameters: int | None = None
    tolerance: float = 0.02
    multiple: int = 8


@dataclass
class TrainConfig:
    """The words of the command line.

    Attributes:
        mixer: what mixes the sequence; a pattern such as sliding_window*3+flash repeats over the layers.
        model: the model's size.
        data: what is trained on.
        tokenizer: how text becomes tokens.
        optimizer: how weights follow their gradients.
        schedule: the course of the learning rate.
        trainer: which devices, and how they share the work.
        logger: where metrics go.
        seq_len: tokens in a training window.
        batch_size: windows per optimizer step, over all devices.
        max_steps: optimizer steps to train.
        max_tokens: tokens to train; with max_steps on the command line that counts, with both there the smaller.
        seed: of weights, data order and everything else that is drawn.
        name: the run's name; its folder is `runs/<name>`.
        resume: auto continues `runs/<name>`, or without a name the newest run of this configuration; or the folder of a
            run or checkpoint.
        checkpoint: folder of a run or checkpoint whose weights a new run begins from; model, mixer and tokenizer are
            its own.
        trust: full names of classes besides longmix's own that checkpoint may name.
        trainable: all, or states: train the states before documents and nothing else.
        tuning: see `TuningConfig`.
        match: see `MatchConfig`.
        loop: see `LoopConfig`.
    """

    mixer: Any = MISSING
    model: Any = MISSING
    data: Any = MISSING
    tokenizer: Any = MISSING
    optimizer: Any = MISSING
    schedule: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING
    seq_len: int = MISSING
    batch_size: int = MISSING
    max_steps: int | None = None
    max_tokens: int | None = None
    seed: int = 0
    name: str = MISSING
    resume: str | None = field(default=None, metadata={"path": True})
    checkpoint: str | None = field(default=None, metadata={"path": True})
    trust: list[str] = field(default_factory=list)
    trainable: str = "all"
    tuning: TuningConfig = field(default_factory=TuningConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass
class EvaluateConfig:
    """The words of `evaluate.py`.

    Attributes:
        checkpoint: folder of a checkpoint, of a run (its newest checkpoint), or of a sweep (every run's newest one).
        states: file of trained states that documents begin from, or the folder of the run that wrote it.
        task: what to evaluate; one choice or a list.
        data: other data than the checkpoint's; null keeps its own.
        split: train, validation or test.
        seq_len: context length, or a list of them; null takes the trained one.
        max_tokens: evenly spread windows of about so many tokens; null takes the whole split.
        batch_size: windows at once; null takes about 16k tokens.
        device: auto, cpu or cuda.
        precision: auto is bf16 on a GPU and float32 on a CPU; or float32, bf16.
        output: folder for results; null takes `evaluation/` in the run's folder.
        trust: full names of classes besides longmix's own that the checkpoint may name.
    """

    checkpoint: str = field(default=MISSING, metadata={"path": True})
    states: str | None = field(default=None, metadata={"path": True})
    task: Any = MISSING
    data: Any = None
    split: str = "validation"
    seq_len: Any = field(default=None, metadata={"takes": int | list[int] | None})
    max_tokens: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    precision: str = "auto"
    output: str | None = field(default=None, metadata={"path": True})
    trust: list[str] = field(default_factory=list)


@dataclass
class GenerateConfig:
    """The words of `generate.py`.

    Attributes:
        checkpoint: folder of a checkpoint, or of a run (its newest checkpoint).
        prompt: a text, or a list of texts that go on side by side.
        prompt_file: a UTF-8 file with the prompt instead.
        max_tokens: tokens to generate for each row.
        samples: continuations of each prompt.
        temperature: below 1 makes likely tokens likelier; 0 always takes the likeliest.
        top_k: draw among so many likeliest tokens; null among all.
        top_p: draw among the likeliest tokens that have this probability together.
        min_p: leave out tokens less likely than this share of the likeliest.
        seed: of what is drawn; null is 0, and with load goes on with what was saved.
        stop: texts that end a row, such as [###].
        states: file of trained states that documents begin from, or the folder of the run that wrote it.
        load: file of an earlier call to go on from.
        save: file to go on from later.
        device: auto, cpu or cuda.
        precision: auto is bf16 on a GPU and float32 on a CPU; or float32, bf16.
        trust: full names of classes besides longmix's own that the checkpoint may name.
    """

    checkpoint: str = field(default=MISSING, metadata={"path": True})
    prompt: Any = field(default="", metadata={"takes": str | list[str], "literal": True})
    prompt_file: str | None = field(default=None, metadata={"path": True})
    max_tokens: int = 256
    samples: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] = field(default_factory=list, metadata={"literal": True})
    states: str | None = field(default=None, metadata={"path": True})
    load: str | None = field(default=None, metadata={"path": True})
    save: str | None = field(default=None, metadata={"path": True})
    device: str = "auto"
    precision: str = "auto"
    trust: list[str] = field(default_factory=list)


@dataclass
class PrepareConfig:
    """The words of `prepare.py`.

    Attributes:
        data: what to prepare.
        tokenizer: how text becomes tokens.
        splits: which token files to make, such as [train,validation]; null makes all.
        workers: processes that tokenise besides this one, and read too what is streamed.
        shard_tokens: a shard ends with the documents that fill it.
    """

    data: Any = MISSING
    tokenizer: Any = MISSING
    splits: list[str] | None = None
    workers: int = 0
    shard_tokens: int = MISSING


def resolved(config: DictConfig) -> Node:
    """The configuration as plain dicts and values with every interpolation carried out.

    Raises:
        ConfigError: a mandatory key has no value, or an interpolation names a key that does not exist.
    """
    try:
        missing = sorted(_without_value(OmegaConf.to_container(config, resolve=False)))
        if missing:
            raise ConfigError(f"no value was given for: {', '.join(missing)}.")
        return typing.cast(Node, OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}.") from error


def _without_value(node: Any, key: str = "") -> list[str]:
    """Mandatory keys without a value; `OmegaConf.missing_keys` fails where an interpolation leads to one."""
    if node == "???":
        return [key]
    if isinstance(node, list):
        return [found for number, part in enumerate(node) for found in _without_value(part, f"{key}[{number}]")]
    if not isinstance(node, dict):
        return []
    return [found for name, part in node.items() for found in _without_value(part, f"{key}.{name}" if key else name)]


def locate(path: str, key: str) -> Callable[..., Any]:
    """Import the class or function a `_target_` names; a `ConfigError` names `key` if there is none."""
    module_name, _, name = path_now(str(path)).rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}._target_={path} cannot be imported: {error}.") from error
    if not callable(target):
        raise ConfigError(f"{key}._target_={path} is a {type(target).__name__}; name a class or a function in it.")
    return target


def build(node: Node, key: str, **supplied: Any) -> Any:
    """Check a `_target_` node against its callable's signature and call it.

    Args:
        node: the settings with `_target_`; nested `_target_` nodes, also by name in a dict, are built first.
        key: where the node stands in the configuration, for messages.
        supplied: arguments that longmix gives; the configuration may not set them.
    """
    check(node, key, set(supplied))
    target = locate(node["_target_"], key)
    hints = settings(target)
    own = {
        name: _built_value(value, hints[name], f"{key}.{name}") for name, value in node.items() if name != "_target_"
    }
    with settings_at(key if key.startswith("data.corpora.") else "data.corpus", "data.corpus"):
        return target(**own, **supplied)


def _built_value(value: Any, hint: Any, key: str) -> Any:
    """A setting as its callable takes it: built where the hint is of a kind that comes from nodes, else as it is."""
    kind, several = node_kind(hint)
    if kind is None or not isinstance(value, dict):
        return value
    if several:
        return {name: build(part, f"{key}.{name}") for name, part in value.items()}
    return build(value, key)


def node_kind(hint: Any) -> tuple[type | None, bool]:
    """The class or protocol whose instances a setting takes, each from a `_target_` node of its own.

    Returns:
        The kind, None where the setting is a plain value; and whether it takes a dict of several by name.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        found = [node_kind(option) for option in arguments]
        return next((option for option in found if option[0] is not None), (None, False))
    if origin in (dict, Mapping):
        return node_kind(arguments[1])[0], True
    is_kind = inspect.isclass(hint) and origin is None and hint.__module__ not in PLAIN_MODULES
    return (hint if is_kind else None), False


def holds_target(value: Any) -> bool:
    """Whether a `_target_` stands anywhere in a setting."""
    if isinstance(value, dict):
        return "_target_" in value or any(map(holds_target, value.values()))
    return isinstance(value, list | tuple) and any(map(holds_target, value))


def check(node: Any, key: str, supplied: set[str], kind: type | None = None) -> None:
    """Refuse unknown, missing and wrongly typed settings of a `_target_` node, naming the key.

    A node within is allowed where the signature asks for an object of some class or protocol, and nowhere else.

    Args:
        node: the settings with `_target_`.
        key: where the node stands in the configuration.
        supplied: names of the arguments that longmix gives.
        kind: base class of what the node stands for; None or a protocol takes any.

    Raises:
        ConfigError: with the nearest allowed name for an unknown key.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"{key}={node!r} is not a choice; it needs `_target_`, as the files in configs/{key} have.")
    target = locate(node["_target_"], key)
    is_open = kind is None or getattr(kind, "_is_protocol", False)
    if kind is not None and not is_open and not (inspect.isclass(target) and issubclass(target, kind)):
        raise ConfigError(f"{key}._target_={node['_target_']} is no class of {kind.__name__}, which {key} needs.")
    parameters = inspect.signature(target).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    for name in supplied:
        if name not in parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ConfigError(f"{key}._target_={node['_target_']} cannot stand for {key}: it takes no argument {name}.")
    hints = settings(target)
    settable = [name for name in hints if name not in supplied]
    for name in node:
        if name != "_target_" and name not in settable:
            raise ConfigError(unknown_key(f"{key}.{name}", name, settable))
    for name in settable:
        needed = name in parameters and parameters[name].default is inspect.Parameter.empty
        if needed and name not in node:
            raise ConfigError(f"{key}.{name} has no value, and {node['_target_']} needs one.")
    for name, value in node.items():
        if name == "_target_":
            continue
        inner_kind, several = node_kind(hints[name])
        if inner_kind is not None and isinstance(value, dict):
            if several:
                for inner, part in value.items():
                    check(part, f"{key}.{name}.{inner}", set(), inner_kind)
            else:
                check(value, f"{key}.{name}", set(), inner_kind)
        elif holds_target(value):
            raise ConfigError(f"{key}.{name} holds a `_target_`, and it must be {_described(hints[name])}.")
        elif not _fits(value, hints[name]):
            raise ConfigError(f"{key}.{name}={value!r} is not {_described(hints[name])}.")


@functools.cache
def settings(target: Callable[..., Any]) -> dict[str, Any]:
    """Names and type hints of the arguments of a callable; `**options: Unpack[Options]` stands for its keys."""
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        hint = hints.get(name, Any)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            if typing.get_origin(hint) is typing.Unpack:
                found |= typing.get_type_hints(typing.get_args(hint)[0])
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            found[name] = hint
    return found


def unknown_key(full_key: str, name: str, allowed: list[str]) -> str:
    """The message for a key that does not exist."""
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"unknown key {full_key}.{hint} Keys there are: {', '.join(allowed) or 'none'}."


def check_keys(node: Node, schema: type, prefix: str = "") -> None:
    """Refuse keys that the dataclass `schema` lacks, and the lack of one it has.

    Hydra checks this itself, but for `+key=value` and `~key`.

    Raises:
        ConfigError: for an unknown key with the nearest allowed name.
    """
    allowed = [entry.name for entry in fields(schema)]
    for name in node:
        if name not in allowed:
            raise ConfigError(unknown_key(f"{prefix}{name}", name, allowed))
    missing = [f"{prefix}{name}" for name in allowed if name not in node]
    if missing:
        raise ConfigError(f"no value was given for: {', '.join(missing)}.")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML or the command line is one of the type `hint`; a number must be finite."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if hint is type(None) or hint is None:
        return value is None
    if hint is float:
        return _fits(value, int) or (isinstance(value, float) and math.isfinite(value))
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER
    if origin is tuple and arguments[-1] is not Ellipsis:
        return isinstance(value, list | tuple) and len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict)
    if getattr(hint, "_is_protocol", False):  # such an object comes from a node of its own
        return False
    return isinstance(value, hint) if inspect.isclass(hint) else True


def _described(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_described(option) for option in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (list, tuple, Sequence):
        return f"a list, each {' or '.join(_described(item) for item in arguments if item is not Ellipsis)}"
    if origin in (dict, Mapping):
        return f"a dict of names and values, each {_described(arguments[1])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if hint not in names and inspect.isclass(hint):
        return f"a {hint.__name__}; it needs a `_target_`"
    return names.get(hint, str(hint).replace("typing.", ""))


def check_words(config: Node) -> None:
    """Refuse unknown and absent words, and impossible values of the top-level words and the loop."""
    check_keys(config, TrainConfig)
    check_keys(config["loop"], LoopConfig, "loop.")
    check_keys(config["tuning"], TuningConfig, "tuning.")
    check_keys(config["match"], MatchConfig, "match.")
    _check_types(config, TrainConfig)
    loop, match = config["loop"], config["match"]
    at_least_one = {
        "seq_len": config["seq_len"],
        "batch_size": config["batch_size"],
        "max_steps": config["max_steps"],
        "max_tokens": config["max_tokens"],
        **{f"loop.{key}": loop[key] for key in LOOP_COUNTS},
        **{f"match.{key}": match[key] for key in ("parameters", "multiple")},
    }
    for key, value in at_least_one.items():
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value} must be at least 1.")
    if config["max_steps"] is None and config["max_tokens"] is None:
        raise ConfigError("give max_steps or max_tokens, or training would never end.")
    if not 0 <= config["seed"] <= LARGEST_SEED:
        raise ConfigError(f"seed={config['seed']} must lie between 0 and {LARGEST_SEED}.")
    if not 0 <= match["tolerance"] < 1:
        raise ConfigError(f"match.tolerance={match['tolerance']} must be at least 0 and below 1.")
    if (
        str(config["resume"]).lower() in ("yes", "true", "on", "1", "newest", "latest")
        and not Path(config["resume"]).exists()
    ):
        raise ConfigError(f"resume={config['resume']} is not there. Did you mean auto? Else give the folder of a run.")
    check_name(config["name"])
    if loop["gradient_clip"] is not None and not loop["gradient_clip"] > 0:
        raise ConfigError(f"loop.gradient_clip={loop['gradient_clip']} must be above 0, or null to never clip.")
    if loop["nonfinite"] not in ("stop", "skip"):
        raise ConfigError(f"loop.nonfinite={loop['nonfinite']!r} is not one of stop, skip.")


def _check_types(node: Node, schema: type, prefix: str = "") -> None:
    """Refuse values that are not of their dataclass's types, which a checkpoint or `+key=value` may bring.

    Raises:
        ConfigError: naming the key.
    """
    hints = typing.get_type_hints(schema)
    for entry in fields(schema):
        hint, value = entry.metadata.get("takes", hints[entry.name]), node[entry.name]
        if is_dataclass(hint):
            _check_types(value, typing.cast(type, hint), f"{prefix}{entry.name}.")
        elif not _fits(value, hint):
            raise ConfigError(f"{prefix}{entry.name}={value!r} is not {_described(hint)}.")


def unlimited_windows(config: Node) -> list[str]:
    """Settings of a window that limits nothing, as it is as long as the rows; a note for the user."""
    mixer = config["mixer"]
    nodes = {f"mixer.{name}": part for name, part in mixer.items() if isinstance(part, dict)} or {"mixer": mixer}
    return [
        f"{place}.{key}={value} limits nothing at seq_len={config['seq_len']}"
        for place, node in nodes.items()
        for key, value in node.items()
        if key in ("window", "local_window") and isinstance(value, int) and value >= config["seq_len"]
    ]


def tokens_per_step(config: Node) -> int:
    """Tokens of one optimizer step over all processes."""
    return config["seq_len"] * config["batch_size"]


def with_limits(config: Node, words: Iterable[str]) -> Node:
    """The configuration with the limit that the command line gives in the place of the other, which a file set.

    Of two limits that the command line gives, or that files give, both stay, and the smaller counts.

    Args:
        config: the resolved configuration.
        words: of the command line.
    """
    given = {word.lstrip("+").partition("=")[0] for word in words if word.partition("=")[2] not in ("null", "")}
    for key, other in (("max_steps", "max_tokens"), ("max_tokens", "max_steps")):
        if key in given and other not in given:
            return {**config, other: None}
    return config


def step_limits(config: Node) -> dict[str, int]:
    """Optimizer steps of the whole run by each of `max_steps` and `max_tokens` that is set."""
    limits = {}
    if config["max_steps"] is not None:
        limits["max_steps"] = config["max_steps"]
    if config["max_tokens"] is not None:
        limits["max_tokens"] = -(-config["max_tokens"] // tokens_per_step(config))
    return limits


def total_steps(config: Node) -> int:
    """Optimizer steps of the whole run: `max_steps`, or as many as `max_tokens` needs, whichever is smaller."""
    return min(step_limits(config).values())


def flattened(node: Node, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
