"""The identity of a run: which settings make another run, and which may change on continuing. See docs/runs.md."""

import dataclasses
import inspect
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longmix.aliases import renewed
from longmix.checkpoints import CheckpointStore, open_checkpoint
from longmix.checkpoints.contents import rebuilding
from longmix.config import (
    STAGE,
    STAGES,
    AdversarialConfig,
    Choice,
    DistilConfig,
    LoopConfig,
    OriginRecord,
    Plain,
    TrainConfig,
    TuningConfig,
    default_setting,
    defaults,
    flattened,
    limits_of,
    locate,
    plain,
    settings_of_stages,
    total_steps,
)
from longmix.config.values import as_given
from longmix.conversion.keeping import PATTERN, same_but_for_layers
from longmix.errors import CheckpointError, ConfigError, LongmixError
from longmix.reading import read_yaml
from longmix.training import schedules
from longmix.training.schedules import Span, sections

CONFIG_FILE = "config.yaml"

FREE = {
    "name": "it says where the run is",
    "resume": "it says how it was started",
    "logger": "it says where metrics go",
    "trust": "it says what may be loaded",
    "match": "it chooses model.mlp_hidden, which counts",
    "loop.log_every": "logging changes nothing",
    "loop.validate_every": "validation leaves weights, random numbers and data as they are",
    "loop.checkpoint_every": "saving changes nothing",
    "loop.keep_checkpoints": "saving changes nothing",
    "loop.sharded_checkpoints": "both forms hold the same tensors",
    "loop.async_checkpoints": "both ways write the same tensors",
    "loop.max_skips": "it says when to give up",
    "loop.profile": "looking at a step changes nothing",
    "loop.tasks": "they leave weights, random numbers and data as they are",
    "loop.tasks_every": "it says when loop.tasks run",
    "data.cache_dir": "what is kept there is verified by its content",
    "data.num_workers": "batches are the same, whoever reads them",
    "data.local_shards": "it says how much is kept at hand",
    "model.activation_checkpointing": "what is computed again is the same again",
    "model.activation_offload": "what is kept elsewhere is the same",
    "trainer.devices": "another place, the same sums but for rounding",
    "trainer.num_nodes": "another place, the same sums but for rounding",
    "trainer.strategy": "another place, the same sums but for rounding",
    "trainer.context_parallel": "another place, the same sums but for rounding",
    "trainer.compile": "the same sums but for rounding",
    "trainer.micro_batch_size": "the same sums but for rounding",
    "trainer.num_threads": "the same sums but for rounding",
    "trainer.timeout": "it says how long to wait",
}
"""Settings that cannot change a run's result, each with its reason; every other one does, and makes another run."""

FIXED = {
    "mixer": "the weights are the mixer's",
    "keep": "it chose the mixer of each layer",
    "measure_tokens": "it chose the mixer of each layer",
    "model": "the weights are the model's",
    "data.corpus": "the place in the data is the corpus's",
    "data.order": "the place in the data is the order's",
    "data.packing": "the place in the data counts windows packed like this",
    "data.max_document_tokens": "the place in the data counts windows of documents cut like this",
    "data.long_documents": "the place in the data counts windows with these repeated",
    "data.long_document_visits": "the place in the data counts windows with documents repeated so often",
    "data.document_mask": "the data of one run are one thing; a stage may have it otherwise",
    "data.positions_go_on": "the data of one run are one thing; a stage may have it otherwise",
    "tokenizer": "the embedding's rows are the tokenizer's",
    "optimizer._target_": "the moments are the optimizer's",
    "seq_len": "the place in the data counts windows of this length",
    "batch_size": "the place in the data counts steps of this size",
    "seed": "it orders the data",
    "trainable": "it says which weights have moments",
    "tuning": "it adds weights",
}
"""Settings that must stay equal when a run continues, each with its reason; all others take effect."""

STAGE_WORDS = ("seq_len", "batch_size", "data", "mixer")
"""Settings of `FIXED` that a stage may have of its own."""

FREE_IN_STAGES = ("micro_batch_size",)
"""Words of a stage that cannot change a run's result."""

GROUPS_OF_WORDS = {"loop": LoopConfig, "tuning": TuningConfig, "adversarial": AdversarialConfig, "distil": DistilConfig}
"""Settings of which each has words of its own and none is a choice, so that their defaults are in these classes."""

ORIGIN = "origin"
"""Entry of a configuration: the meaning of `checkpoint` as the run began, a folder and the digest of its files."""

UNREADABLE = (KeyError, TypeError, ValueError, ArithmeticError, AttributeError)
"""Errors that values of other kinds than longmix writes may raise."""

SHOWN_DIFFERENCES = 5
ABSENT = "absent"
KNOWN_SCHEDULES = {
    f"{schedule.__module__}.{schedule.__name__}": schedule
    for schedule in (schedules.WarmupCosine, schedules.WarmupStableDecay)
}

Changes = dict[str, tuple[object, object]]
"""Changed settings, each with its old and new value."""

log = logging.getLogger(__name__)


def changes(saved: Plain, config: TrainConfig, counting: tuple[str, ...] = ()) -> Changes:
    """Every setting that can change a run's result and has another value.

    The two limits count as the steps that they allow. A setting that one side lacks, as versions of longmix add some,
    has its default there. `checkpoint` counts as the weights that it meant.

    Args:
        saved: the configuration in a run's folder or checkpoint, which any version may have written.
        config: that of this command.
        counting: words that count, with all below them, even if they are in `FREE`.
    """
    own = _own(saved, config)
    found = _differences(saved, own, counting)
    found.pop("checkpoint", None)
    both_fresh = saved.get("checkpoint") is None and config.checkpoint is None
    if not both_fresh and not _began_with_same_weights(saved, config):
        found["checkpoint"] = (_shown_origin(saved), _shown_origin(own))
    return found


def _own(saved: Plain, config: TrainConfig) -> Plain:
    """This command's configuration. Which layers a measurement lets keep their mixer, only the run itself knows."""
    own = plain(config)
    if isinstance(config.keep, int) and same_but_for_layers(saved.get("mixer"), own["mixer"]):
        own["mixer"] = own["mixer"] | {PATTERN: saved["mixer"][PATTERN]}
    return own


def _differences(saved: Plain, own: Plain, counting: tuple[str, ...] = ()) -> Changes:
    """Every setting of two configurations, that of a file and one of this command, that differs and counts."""
    before, now = _leaves(saved), _leaves(own)
    found: Changes = {}
    for key in {**before, **now}:
        if _is_below(key, FREE) and not _is_below(key, counting):
            continue
        old = before[key] if key in before else _default(own, key)
        new = now[key] if key in now else _default(own, key)
        if old != new:
            found[key] = (old, new)
    return found


def _fixed_changes(saved: Plain, config: TrainConfig, step: int) -> Changes:
    """Changes of what must stay equal: in stages that have begun, and how long those are that others followed.

    A run without stages is one stage, so that a run may get stages, or lose those that have not begun.
    """
    own = _own(saved, config)
    if not saved.get(STAGES) and config.stages is None:
        return {key: change for key, change in _differences(saved, own).items() if _is_below(key, FIXED)}
    before, now = settings_of_stages(saved), settings_of_stages(own)
    found: Changes = {}
    start = 0
    for number, stage in enumerate(before):
        if start >= step:
            break
        place, steps = f"{STAGES}[{number}]", _steps(stage.settings)
        if number == len(now):
            found[place] = (f"a stage of {steps} steps", ABSENT)
            break
        settings = now[number].settings
        for key, change in _differences(stage.settings, settings).items():
            if _is_below(key, FIXED):
                found[f"{place}.{key}" if _is_below(key, STAGE_WORDS) else key] = change
        now_steps = _steps(settings)
        if (now_steps != steps) if start + steps < step else (start + now_steps < step):
            found[f"the length of {place}"] = (f"{steps} steps", f"{now_steps} steps")
        start += steps
    return found


def phrases(found: Changes) -> str:
    """The first few changes as text."""
    shown = [
        f"{key} was {_shown(was)} and is {_shown(value)}"
        for key, (was, value) in list(found.items())[:SHOWN_DIFFERENCES]
    ]
    more = f" and {len(found) - SHOWN_DIFFERENCES} more" if len(found) > SHOWN_DIFFERENCES else ""
    return "; ".join(shown) + more


def _shown(value: object) -> str:
    return value if isinstance(value, str) else as_given(value)


def check_continues(saved: Plain, config: TrainConfig, checkpoint: Path, step: int) -> None:
    """Refuse to continue a run with settings that cannot take effect in it.

    Raises:
        CheckpointError: names what differs.
    """
    found = changes(saved, config)
    with rebuilding(checkpoint):
        fixed = _fixed_changes(saved, config, step)
    found.pop("checkpoint", None)
    began, given = saved.get("checkpoint"), config.checkpoint
    if (given is not None and not _is_same_origin(saved, config)) or (given is None and began is not None and fixed):
        fresh = "fresh weights"
        cure = f"give checkpoint={began}" if began is not None else "leave checkpoint out"
        raise CheckpointError(
            f"{checkpoint} is of a run that began from {began or fresh}, not from {given or fresh}; {cure}, or start a "
            "new run."
        )
    if fixed:
        raise CheckpointError(
            f"{checkpoint} is of another run: {phrases(fixed)}. Use its settings, or start a new run."
        )
    if found and step >= total_steps(config):
        raise CheckpointError(
            f"{checkpoint} has taken {step} of {total_steps(config)} steps, so that nothing is left to train with "
            f"other settings: {phrases(found)}. Ask for more steps, use its settings, or start a new run under another "
            "name."
        )


def announce(saved: Plain, config: TrainConfig, step: int) -> None:
    """Log every setting that takes effect from the next step, and how the learning rate changes there."""
    found = changes(saved, config)
    found.pop("checkpoint", None)
    for key, (was, value) in found.items():
        log.info("%s was %s and is %s from step %d.", key, _shown(was), _shown(value), step + 1)
    own = plain(config)
    before, now = (_learning_rate(each, step, config.schedule.target) for each in (saved, own))
    if before is not None and now is not None and abs(before - now) > 1e-9 * abs(before):
        log.info("The learning rate of step %d is %.4g; with the earlier settings it was %.4g.", step + 1, now, before)


def read_config(run: Path) -> Plain | None:
    """The configuration of the run in a folder; None if there is no run, or it cannot be read, which is logged.

    Where `config.yaml` is damaged, the one in the newest checkpoint takes its place.
    """
    latest = CheckpointStore(run / "checkpoints").latest()
    if not (run / CONFIG_FILE).exists() and latest is None:
        return None
    try:
        return renewed(read_yaml(run / CONFIG_FILE))
    except ConfigError as error:
        problem: LongmixError = error
    if latest is not None:
        try:
            return dict(open_checkpoint(latest).rest()["config"])
        except (LongmixError, KeyError, TypeError, ValueError) as error:
            problem = error if isinstance(error, LongmixError) else problem
    log.warning("%s is passed over: %s", run, problem)
    return None


def is_unknown_origin(saved: Plain, config: TrainConfig) -> bool:
    """Whether a run began from the same word as this command, and an earlier version did not keep which weights."""
    same_word = saved.get("checkpoint") is not None and saved.get("checkpoint") == config.checkpoint
    return same_word and not saved.get(ORIGIN) and changes(saved, config).keys() == {"checkpoint"}


def _is_same_origin(saved: Plain, config: TrainConfig) -> bool:
    """Whether a run that goes on began from what the command line names, be it by a word that means more by now."""
    began, given = saved.get("checkpoint"), str(config.checkpoint)
    if began is None:
        return False
    places = {Path(str(place)).absolute().resolve() for place in (began, _shown_origin(saved))}
    return Path(given).absolute().resolve() in places or _began_with_same_weights(saved, config)


def _began_with_same_weights(saved: Plain, config: TrainConfig) -> bool:
    """Whether both record the weights that they began from, and these are the same."""
    was = OriginRecord.of(saved.get(ORIGIN))
    return was is not None and config.origin is not None and was.weights == config.origin.weights


def _shown_origin(written: Plain) -> str | None:
    record = OriginRecord.of(written.get(ORIGIN))
    return written.get("checkpoint") if record is None else record.checkpoint


def _is_below(key: str, keys: Iterable[str]) -> bool:
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def _leaves(written: Plain) -> dict[str, object]:
    limits = ("max_steps", "max_tokens")
    flat = flattened({key: value for key, value in written.items() if key not in (*limits, ORIGIN, STAGE)})
    try:
        if written.get(STAGES):
            flat[STAGES] = [
                {key: value for key, value in stage.items() if key not in FREE_IN_STAGES and value is not None}
                for stage in written[STAGES]
            ]
        return flat | {"steps": _all_steps(written)}
    except (
        KeyError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
    ):  # whoever wrote the file meant something else
        return flat | {key: written.get(key) for key in limits}


def _steps(written: Plain) -> int:
    tokens_of_a_step = written["seq_len"] * written["batch_size"]
    return min(limits_of(written["max_steps"], written["max_tokens"], tokens_of_a_step).values())


def _all_steps(written: Plain) -> int:
    return sum(_steps(stage.settings) for stage in settings_of_stages(written))


def _default(written: Plain, key: str) -> object:
    """The value of an absent setting: the default of the callable that takes it, at this command's `_target_`."""
    *above, name = key.split(".")
    node: Any = written
    for part in above:
        node = node.get(part) if isinstance(node, dict) else None
    if not above or (len(above) == 1 and above[0] in GROUPS_OF_WORDS):
        kind = GROUPS_OF_WORDS[above[0]] if above else TrainConfig
        return defaults(kind).get(name, ABSENT)
    if not isinstance(node, dict) or "_target_" not in node:
        return ABSENT
    if name == "_target_":  # the whole node is absent
        return _default_target(written, above)
    default = default_setting(locate(node["_target_"], key), name)
    if default is inspect.Parameter.empty:
        return ABSENT
    return list(default) if isinstance(default, tuple) else default


def _default_target(written: Plain, place: list[str]) -> object:
    """The class of the object that stands for an absent node, where the callable around it has one as its default."""
    around = written.get(place[0]) if len(place) == 2 else None
    if not isinstance(around, dict) or "_target_" not in around:
        return ABSENT
    default = default_setting(locate(around["_target_"], place[0]), place[1])
    kind = type(default)
    return f"{kind.__module__}.{kind.__qualname__}" if dataclasses.is_dataclass(kind) else ABSENT


def _learning_rate(written: Plain, step: int, trusted: str) -> float | None:
    """The peak of the first optimizer times the schedule's factor; None where that cannot be told.

    Args:
        written: a configuration, maybe of a file.
        step: counted from 0.
        trusted: the schedule of this command; a file may have no other one built than that or ours.
    """
    try:
        spans: list[Span] = []
        stages = settings_of_stages(written)
        for stage in stages:
            start = spans[-1].start + spans[-1].steps if spans else 0
            spans.append(Span(start, _steps(stage.settings), stage.begins_schedule, stage.learning_rate_scale))
        schedule = sections(spans, lambda number: _schedule(stages[number].settings, trusted))
        return float(written["optimizer"]["learning_rate"] * schedule(step, spans[-1].start + spans[-1].steps))
    except (LongmixError, *UNREADABLE):
        return None


def _schedule(written: Plain, trusted: str) -> schedules.Schedule:
    node = written.get("schedule")
    node = node if isinstance(node, dict) else {}
    target = str(node.get("_target_"))
    if target == trusted:
        schedule: schedules.Schedule = Choice.of("schedule", node).build()
        return schedule
    return KNOWN_SCHEDULES[target](**{key: node[key] for key in node if key != "_target_"})
