"""Which layers of a converted model keep the teacher's mixer, where `keep=N` leaves that to a measurement."""

import dataclasses
import functools
from contextlib import nullcontext
from typing import cast

import torch

from longmix.config import Choice, Pattern, TrainConfig
from longmix.conversion.keeping import with_kept
from longmix.data.staged import StagedData
from longmix.data.training_data import TrainingData
from longmix.distributed.agreement import Processes
from longmix.evaluation.loss import evaluate_loss
from longmix.evaluation.statistics import LossStatistics
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model, check_model
from longmix.model.tuned_states_file import load_weights
from longmix.naming import mixer_word
from longmix.progress import steps_bar
from longmix.training.damage import Damage, Precision, lessons_of, measure
from longmix.training.hardware import TrainerSettings
from longmix.training.warm_start import Origin


def with_kept_layers(
    config: TrainConfig,
    origin: Origin | None,
    settings: TrainerSettings,
    data: TrainingData,
    begun: bool,
    everyone: Processes,
) -> tuple[TrainConfig, Damage | None]:
    """The configuration with the layers that keep the teacher's mixer, and what was measured to choose them.

    A run that continues has chosen; its configuration comes back as it is, and so does one that names the layers.

    Args:
        config: of the run; the first `keep` layers keep theirs so far.
        origin: the teacher's weights.
        settings: of the trainer.
        data: prepared.
        begun: the run continues.
        everyone: the processes of the run, which measure a share of the layers each; all of them must call this.

    Raises:
        ConfigError: the measurement cannot choose between two layers.
    """
    if not isinstance(config.keep, int) or begun or origin is None or origin.teacher is None:
        return config, None
    damage = _measured(config, origin, settings, data.first if isinstance(data, StagedData) else data, everyone)
    teacher, new = origin.teacher, _new(config)
    chosen = with_kept(new, teacher.mixer, damage.largest(config.keep), len(damage.losses))
    config = dataclasses.replace(config, mixer=chosen)
    check_model(config)
    return config, damage


def described(config: TrainConfig, damage: Damage) -> str:
    """A line that says which layers keep the teacher's mixer, and the damage of all."""
    kept = [index for index, name in enumerate(cast(Pattern, config.mixer).order) if name != _name_of_new(config)]
    figures = ", ".join(f"{each:.3f}" for each in damage.of_layers)
    keep = f"layer {kept[0]} keeps its" if len(kept) == 1 else f"layers {', '.join(map(str, kept))} keep their"
    return f"{keep} mixer; nats per token that each layer alone costs: {figures}"


def _name_of_new(config: TrainConfig) -> str:
    """The name of the new mixer in the pattern, which begins with it."""
    return next(name for name in cast(Pattern, config.mixer).entries if name != "pattern")


def _new(config: TrainConfig) -> Choice:
    member = cast(Pattern, config.mixer).members[_name_of_new(config)]
    return Choice("mixer", member.entries)


def _measured(
    config: TrainConfig, origin: Origin, settings: TrainerSettings, data: TrainingData, everyone: Processes
) -> Damage:
    assert origin.teacher is not None
    precision = settings.precision_in_use
    device = torch.device("cuda" if settings.on_gpu else "cpu")
    with torch.random.fork_rng():
        teacher = build_model(origin.teacher, origin.vocab_size)
    load_weights(teacher, origin.weights)
    teacher.to(device=device, dtype=torch.bfloat16 if precision == "bf16-true" else None)
    teacher.eval().requires_grad_(False)
    autocast: Precision = nullcontext
    if precision == "bf16-mixed":
        autocast = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16)
    steps = -(-config.measure_tokens // data.seq_len)
    layers = len(teacher.blocks)
    if everyone.is_first:
        print(f" damage   of {mixer_word(_new(config).entries)} in each of {layers} layers is measured", flush=True)
    with steps_bar("layers", -(-layers // everyone.size), shown=everyone.is_first) as advance:
        return measure(
            teacher,
            origin.teacher,
            _new(config),
            lessons_of(data, steps),
            functools.partial(_loss, data=data, device=device, precision=autocast),
            steps=steps,
            seed=config.seed,
            precision=autocast,
            done=advance,
            processes=everyone,
        )


def _loss(model: LanguageModel, data: TrainingData, device: torch.device, precision: Precision) -> float:
    """Of the windows of a validation."""
    loader = data.evaluation_loader("validation", data.seq_len, 1, data.validation_tokens)
    statistics = LossStatistics(torch.as_tensor(data.token_bytes), data.seq_len, device)
    evaluate_loss(model, loader, statistics, device=device, precision=precision)
    return statistics.summary()["loss"]
