"""Begins training from a checkpoint's weights: trains all of them, or only the states before documents."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from torch import Tensor

from longmix.checkpoints import CheckpointStore, chosen_checkpoint
from longmix.checkpoints.contents import load_model_state, rebuilding
from longmix.checkpoints.find import LAST, last_checkpoint
from longmix.checkpoints.verify import weights_digest
from longmix.command_line.schema import configs_folder
from longmix.config import Choice, ModelConfig, OriginRecord, Pattern, TrainConfig, TuningConfig, defaults
from longmix.conversion.inherited import with_teachers_settings
from longmix.conversion.keeping import with_kept_first, with_new
from longmix.conversion.transfer import Transfer, transfer
from longmix.data.tokens.saved import tokenizer_from_state
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.distributed.agreement import Processes
from longmix.distributed.ranks import was_restarted
from longmix.errors import CheckpointError, ConfigError
from longmix.invocation import Invocation
from longmix.model.backbone import LanguageModel
from longmix.model.changes import OF_TRAINING, changed_mixer
from longmix.model.tuned_states_file import load_weights, memory_features, tune_states, tuned_states
from longmix.trust import check_model_nodes

EXPERIMENT = "experiment"

TAKEN = ("mixer", "model", "tokenizer", "block")
"""Words that come from the checkpoint; settings that may change after training may be given besides."""


@dataclass(frozen=True)
class Origin:
    """The checkpoint to begin from. A run that continues for certain uses its own, as the first may be gone.

    Attributes:
        weights: the model's.
        tokenizer: the one it was trained with.
        record: which checkpoint the command line names, as `config.yaml` keeps it; None if there is none any more.
        trained: the configuration of the model that has these weights; None if a run continues from its own.
        converts: another model takes what it can of them.
    """

    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    record: OriginRecord | None
    trained: ModelConfig | None = None
    converts: bool = False

    @property
    def teacher(self) -> ModelConfig | None:
        """The configuration of the model that is converted, if one is."""
        return self.trained if self.converts else None

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding; imported models may have more than their tokenizer has ids."""
        return self.weights["embedding.weight"].shape[0]

    def check_same(self, processes: Processes) -> None:
        """Refuse to begin if processes read different weights, because the run there was still training.

        Raises:
            CheckpointError: names checkpoints that do not change; the same in all processes, which must all call it.
        """
        records = processes.each(lambda: self.record)
        found = sorted({record.checkpoint for record in records if record is not None})
        if any(record != records[0] for record in records):
            raise CheckpointError(
                f"the run that checkpoint= names went on while the processes began: they found {' and '.join(found)}. "
                f"Give one of its checkpoints, such as checkpoint={found[-1]}."
            )


def begins_from(config: TrainConfig, invocation: Invocation) -> tuple[TrainConfig, Origin | None]:
    """The origin that the word `checkpoint` names, and the configuration with the origin's model, mixer and tokenizer.

    The configuration's `origin` becomes the record, for runs to be told apart whose `checkpoint` is the same word.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: the command line also says what comes from the checkpoint.
    """
    if config.checkpoint is None and config.convert:
        raise ConfigError("convert=true gives another model's weights to this one; give checkpoint=RUN.")
    check_keep(config)
    if config.checkpoint is None:
        return config, None
    if config.convert and not _names_mixer(invocation):
        raise ConfigError("convert=true needs the mixer that the model gets, such as mixer=mlstm_tfla*3+flash.")
    for override in invocation.words:
        word = override.lstrip("+~").partition("=")[0]
        group, _, setting = word.partition(".")
        if config.convert and group == "mixer":
            continue
        may_change = setting and (group == "mixer" or (group == "model" and setting in OF_TRAINING))
        if group in TAKEN and (override.startswith("~") or not may_change):
            rest = f" May change: {', '.join(f'model.{name}' for name in OF_TRAINING)}." if group == "model" else ""
            raise ConfigError(f"{word} comes from checkpoint={config.checkpoint}; leave one of the two out.{rest}")
    own = continued_checkpoint(config, invocation)
    state = None if own is None else load_model_state(own)
    word = config.checkpoint
    if word == LAST:  # the configuration that is kept names the run itself
        began = None if state is None else state["config"].get("checkpoint")
        word = str(began or chosen_checkpoint(LAST, invocation.folder))
    record: OriginRecord | None = None
    try:
        named = chosen_checkpoint(word)
        record = OriginRecord(str(named.absolute()), weights_digest(named))
    except CheckpointError:
        if own is None:
            raise
        named = own
    checkpoint = own or named
    state = load_model_state(checkpoint) if state is None else state
    with rebuilding(checkpoint):
        check_model_nodes(state["config"], config.trust)
        trained = ModelConfig.of(state["config"])
        tokenizer = Choice.of("tokenizer", state["config"]["tokenizer"])
        weights, saved = state["model"], tokenizer_from_state(state["tokenizer"])
        begins = own is None
        origin = Origin(weights, saved, record, trained if begins else None, config.convert and begins)
    mixer = config.mixer
    if config.convert:
        mixer = with_teachers_settings(config.mixer, _given(config, invocation), trained.mixer)
        if config.keep is not None:
            mixer = _with_kept(mixer, config.keep, trained, is_converted=not begins)
    else:
        mixer = changed_mixer(trained.mixer, _given(config, invocation), f"checkpoint={word}")
    model = trained.model.having(**_given_of_model(config, invocation))
    config = dataclasses.replace(config, mixer=mixer, model=model, tokenizer=tokenizer)
    return dataclasses.replace(config, checkpoint=word, origin=record), origin


def check_keep(config: TrainConfig) -> None:
    """Refuse words about kept layers that have no effect.

    Raises:
        ConfigError: naming the word.
    """
    if config.keep is not None and not config.convert:
        raise ConfigError(
            "keep= chooses layers that a conversion leaves as they are; add convert=true, or leave it out."
        )
    if config.measure_tokens != defaults(TrainConfig)["measure_tokens"] and not isinstance(config.keep, int):
        raise ConfigError("measure_tokens has no effect without keep=N. Add it, or leave measure_tokens out.")


def _with_kept(
    new: Choice | Pattern, keep: int | list[int], trained: ModelConfig, is_converted: bool
) -> Choice | Pattern:
    """The mixers of a model of which some layers keep the teacher's; how many are to be measured, the first ones do.

    Which those are is known only when the data are there (`longmix.training.kept_layers`). Until then everything that
    looks at the configuration sees as many layers of each kind as there will be.

    Raises:
        ConfigError: layers that are not there, or that leave none to convert.
    """
    if is_converted:
        return with_new(new, trained.mixer)
    return with_kept_first(new, keep, trained.mixer, trained.model.number("num_layers"))


def _names_mixer(invocation: Invocation) -> bool:
    """Whether a word of the command, or its experiment, chooses the mixer."""
    chosen = _chooses_mixer(_experiment(invocation))
    return chosen or any(word.lstrip("+").partition("=")[0] == "mixer" for word in invocation.words)


def _given(config: TrainConfig, invocation: Invocation) -> dict[str, Any]:
    """The settings of the mixer on the command line and in its experiment, by the parts of their names."""
    words = [word.lstrip("+").partition("=")[0] for word in invocation.words]
    named = [word.split(".")[1:] for word in words if word.startswith("mixer.")]
    found: dict[str, Any] = {}
    for parts in (*named, *_named_by_experiment(invocation, config.convert)):
        node, value = found, config.mixer.entries
        for part in parts[:-1]:
            node, value = node.setdefault(part, {}), cast(Mapping[str, Any], value[part])
        node[parts[-1]] = value[parts[-1]]
    return found


def _given_of_model(config: TrainConfig, invocation: Invocation) -> dict[str, Any]:
    """The settings of the model that may change, on the command line and in its experiment."""
    named = {word.lstrip("+").partition("=")[0] for word in invocation.words}
    named |= {f"model.{name}" for name in _experiment(invocation).get("model") or ()}
    return {name: config.model.entries[name] for name in OF_TRAINING if f"model.{name}" in named}


def _named_by_experiment(invocation: Invocation, converts: bool) -> list[list[str]]:
    """The settings of the mixer that the experiment's file has, by the parts of their names.

    None if it also chooses the mixer, but for a conversion: then they are that mixer's, and the checkpoint has its own.
    """
    file = _experiment(invocation)
    own = file.get("mixer")
    if not isinstance(own, dict) or (_chooses_mixer(file) and not converts):
        return []
    return [parts for parts in _leaves(own) if parts != ["_target_"]]


def _chooses_mixer(experiment: Mapping[str, Any]) -> bool:
    """Whether the defaults in an experiment's file name a mixer."""
    chosen = [str(key) for entry in experiment.get("defaults", []) if isinstance(entry, dict) for key in entry]
    return any(key.split()[-1].lstrip("/") == "mixer" for key in chosen)


def _experiment(invocation: Invocation) -> dict[str, Any]:
    """The content of the experiment's file; empty without one."""
    name = str(invocation.choices.get(EXPERIMENT))
    folders = [configs_folder(), *invocation.folders]
    files = [path for folder in folders if (path := folder / EXPERIMENT / f"{name}.yaml").is_file()]
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(files[0]), resolve=False)) if files else {}


def _leaves(settings: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from ([name, *rest] for rest in _leaves(value))
        else:
            yield [name]


def continued_checkpoint(config: TrainConfig, invocation: Invocation) -> Path | None:
    """The checkpoint that this command continues for certain; None if it may begin a new run.

    That checkpoint holds model, mixer, tokenizer and weights.
    """
    resume = config.resume
    if resume == LAST:
        return last_checkpoint()
    if resume not in (None, "auto"):
        return chosen_checkpoint(resume)
    if invocation.in_sweep or not (resume == "auto" or was_restarted()):
        return None
    return CheckpointStore(invocation.folder / "checkpoints").latest()


def _tuned_further(model: LanguageModel, words: TuningConfig) -> list[str]:
    """Let a model have states to tune, which go on from those that it has already; returns their names.

    Raises:
        ConfigError: there are no such states in the model, or those that it has come with a memory of another size.
    """
    found = tuned_states(model.state_dict())
    features = memory_features(found)
    if features not in (0, words.features):
        raise ConfigError(
            f"tuning.features={words.features}: the states of the checkpoint have a memory of {features} features; "
            f"give tuning.features={features}."
        )
    names = tune_states(model, words.features, words.decorrelation)
    model.load_state_dict(found, strict=False)
    return names


def begin(model: LanguageModel, config: TrainConfig, origin: Origin | None) -> Transfer | None:
    """Load the weights of the origin; with `trainable=states` train nothing but states before documents.

    Returns:
        What was taken, if the weights are those of a model with another mixer.

    Raises:
        ConfigError: there are no such states in the model, or the origin's have a memory of another size.
    """
    report = None
    if origin is not None and origin.teacher is not None:
        report = transfer(model, origin.weights, origin.teacher)
    elif origin is not None:
        load_weights(model, origin.weights)
    if config.trainable == "states":
        states = set(_tuned_further(model, config.tuning))
        for name, weight in model.named_parameters():
            weight.requires_grad_(name in states)
    return report
