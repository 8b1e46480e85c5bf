"""`train(config)`: from a configuration to a trained, logged, resumable run."""

import contextlib
import dataclasses
import logging
import re
import sys
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from longmix.checkpoints import CheckpointStore, load_checkpoint
from longmix.command_line.values import hydra_word
from longmix.config import ModelConfig, TrainConfig, course_of, flattened, plain, reached, read, with_limits
from longmix.conversion.teacher import teacher_of
from longmix.data.staged import data_of
from longmix.data.tokens.tokenizers import Tokenizer
from longmix.data.training_data import TrainingData
from longmix.distributed.agreement import Processes
from longmix.distributed.ranks import own_ranks, process_rank
from longmix.errors import ConfigError, DataError
from longmix.files import storage_errors
from longmix.invocation import Invocation
from longmix.machine_memory import freed_memory_kept
from longmix.mixers.parts.whole_rows import warn_of_whole_rows
from longmix.model.backbone import LanguageModel
from longmix.model.build import build_model, check_model
from longmix.model.matching import match_parameters
from longmix.model.recomputing import silence_advice
from longmix.model.tuned_states_file import STATES_FILE, save_states, tunable_mixers
from longmix.naming import RunPlace, named_by_clock
from longmix.notices import notice, notice_float32_on_gpu
from longmix.progress import ProgressDisplay
from longmix.startup import seconds_since_begin
from longmix.training import connection, process_launcher, random_state
from longmix.training.adversarial import attacked_steps, check_adversarial
from longmix.training.averaging import WeightAverage
from longmix.training.carried import CarriedState, check_carries, layers_begun_anew
from longmix.training.claims import remove_unused
from longmix.training.distillation import Distillation, check_lessons, check_objective, needs_teacher
from longmix.training.ending import check_stop_at_recall
from longmix.training.hardware import TrainerSettings
from longmix.training.kept_layers import described, with_kept_layers
from longmix.training.loggers import NoLog
from longmix.training.module import TrainingModule
from longmix.training.positions import check_positions
from longmix.training.profile import check_profile, profiled
from longmix.training.resume import Start, find_start, start_alone
from longmix.training.run_state import Provenance
from longmix.training.schedules import schedule_of
from longmix.training.spikes import SpikeGuard
from longmix.training.stages import check_memory_of_stages, check_stages, check_words_have_effect, draws, each_part
from longmix.training.summary import (
    SUMMARY_FILE,
    Summary,
    mean_flops_per_token,
    print_header,
    print_summary,
    read_own_summary,
    write_summary,
)
from longmix.training.supervisor import Supervisor
from longmix.training.tasks_during import TaskDuring, TasksDuring, tasks_of
from longmix.training.warm_start import Origin, begin, begins_from
from longmix.versions import versions


def train(config: TrainConfig | DictConfig, invocation: Invocation | None = None) -> Summary:
    """Train as `config` says and return the run's summary.

    Everything that can be refused is refused before the data are touched.

    Args:
        config: the words; as Hydra composed them, they may have interpolations.
        invocation: how the run was asked for; that of the command which Hydra has begun if not given.

    Raises:
        LongmixError: see `longmix.errors`; each has its exit code.
    """
    invocation = invocation or Invocation.of_command()
    by_clock = isinstance(config, DictConfig) and named_by_clock(config)
    config = with_limits(read(TrainConfig, config) if isinstance(config, DictConfig) else config, invocation.words)
    config.check_together()
    check_words_have_effect(config, invocation.words)
    config, origin = begins_from(config, invocation)
    settings, data = check_config(config, None if origin is None else origin.tokenizer, invocation.folders)
    _check_tokenizer_is_used(data, invocation.words)
    if origin is not None and origin.trained is not None and needs_teacher(course_of(config)):
        check_lessons(course_of(config), check_model(origin.trained))
    config = match_parameters(config, data.expected_vocab_size)
    check_memory_of_stages(course_of(config), settings, data.expected_vocab_size)
    place = RunPlace.of(config, by_clock, invocation)
    config = dataclasses.replace(config, name=place.name)
    if place.folder != invocation.folder:
        remove_unused(invocation.folder)  # the checkpoint gives the run another name than Hydra could know
    if settings.world_size == 1:
        return _train(config, settings, data, origin, place, invocation, Processes())
    if own_ranks() is None:
        _start_processes(config, settings, data, place, invocation)
        return {}
    with connection.losses_explained(settings.timeout):
        everyone = connection.connect(settings)
        summary = _train(config, settings, data, origin, place, invocation, everyone)
    connection.disconnect()
    return summary


def _check_tokenizer_is_used(data: TrainingData, words: Sequence[str]) -> None:
    given = [word for word in words if re.match(r"\+*tokenizer[.=]", word)]
    if given and data.makes_numbers:
        raise ConfigError(f"{given[0]} has no use: data.task makes numbers, not text. Leave it out.")


def _start_processes(
    config: TrainConfig, settings: TrainerSettings, data: TrainingData, place: RunPlace, invocation: Invocation
) -> None:
    """Refuse what can be refused and prepare the data once, then have this command run by several processes."""
    if not invocation.is_command and not invocation.in_sweep:
        raise ConfigError(
            f"trainer.strategy={settings.strategy} on {settings.world_size} processes: a call from Python cannot start "
            "them; use `longmix train`, or call it in each process that torchrun starts."
        )
    if invocation.in_sweep:
        raise ConfigError(
            f"a sweep (-m) with trainer.strategy={settings.strategy} on {settings.world_size} processes cannot start "
            "its own processes; sweep on one device, or start each run with torchrun."
        )
    if settings.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={settings.num_nodes}: start the processes on each machine with torchrun or srun, which "
            "say where the others are."
        )
    with start_alone(config, place.folder, place.named) as start:
        data.prepare_data()
        words = [hydra_word("hydra.run.dir", str(start.folder)), hydra_word("name", start.name)]
        command = [sys.executable, *sys.orig_argv[1:], *words]
        process_launcher.launch(command, settings.devices_here, settings.timeout, start.folder, start.lock)


def _train(
    config: TrainConfig,
    settings: TrainerSettings,
    data: TrainingData,
    origin: Origin | None,
    place: RunPlace,
    invocation: Invocation,
    everyone: Processes,
) -> Summary:
    began = time.monotonic()
    quieten()
    seed_everything(config.seed, settings.num_threads)
    if origin is not None:
        origin.check_same(everyone)
    with find_start(config, place.folder, everyone, named=place.named, swept=invocation.swept) as start:
        return _train_from(start, start.config_of(config), settings, data, origin, invocation, everyone, began)


def _train_from(
    start: Start,
    config: TrainConfig,
    settings: TrainerSettings,
    data: TrainingData,
    origin: Origin | None,
    invocation: Invocation,
    everyone: Processes,
    began: float,
) -> Summary:
    is_first = process_rank() == 0
    if not is_first:
        logging.disable(logging.INFO)
    data.prepare_data()
    data.setup("fit")
    everyone.each(lambda: start.check_data(data.fingerprint(), course_of(config).begun(start.step)))
    config, damage = with_kept_layers(config, origin, settings, data, start.saved is not None, everyone)
    model = build_model(config, data.vocab_size if origin is None else origin.vocab_size)
    transferred = begin(model, config, origin)
    if draws(model, course_of(config)):
        random_state.diverge(config.seed, process_rank(), 0)
    model.measures_hits = data.makes_numbers
    model.measures_normalisers = config.loop.z_loss > 0
    if is_first:
        print_header(config, start.folder, model, data, settings, start.step, invocation.choices)
    everyone.first(lambda: start.begin(config))
    if is_first and transferred is not None:
        print(f" taken    {transferred.line}", flush=True)
        if damage is not None:
            print(f" kept     {described(config, damage)}", flush=True)
        transferred.write(start.folder, {} if damage is None else damage.report())

    module = _module(config, model, settings, everyone, start.step)
    supervisor = _supervisor(config, data, start, is_first, tasks_of(config, model.mixers(), invocation.folders))
    is_done = supervisor.has_ended(start.step)
    if not is_done:
        _fit_logged(settings, module, data, supervisor, start, is_first)
    if not is_first:
        return {}
    states = start.folder / STATES_FILE
    latest = supervisor.store.latest()
    if config.trainable == "states" and latest is not None and not (is_done and states.exists()):
        content = load_checkpoint(latest)
        save_states(states, ModelConfig.of(reached(content["config"])), content["model"])
    seconds = time.monotonic() - began
    if invocation.is_command:  # of a sweep, the command has other runs too
        seconds = seconds_since_begin(seconds)
    summary = read_own_summary(start.folder, start.step) if is_done else None
    if summary is None:
        summary = write_summary(config, start.folder, model, data, supervisor, invocation.choices)
    print_summary(summary, start.folder, supervisor, seconds)
    return summary


def check_config(
    config: TrainConfig, tokenizer: Tokenizer | None = None, folders: Sequence[Path] = ()
) -> tuple[TrainerSettings, TrainingData]:
    """Refuse whatever cannot work, without reading data and without allocating a weight.

    Args:
        config: the words.
        tokenizer: takes the place of the one that the configuration describes.
        folders: see `tasks_of`.

    Returns:
        The trainer's settings and the data, not yet prepared.

    Raises:
        ConfigError: naming the key.
        DataError: the corpus has no validation split.
    """
    config.check_together()
    course = course_of(config)
    for part in course.parts:
        part.config.data.check({"tokenizer", "seq_len", "batch_size", "seed"})
    if tokenizer is None:  # else it comes from a checkpoint, whose choice is not to be looked up
        config.tokenizer.check(set())
    config.optimizer.check({"parameters"})
    for choice in (*(part.config.schedule for part in course.parts), config.trainer, config.logger):
        choice.check(set())
    schedule_of(course)
    check_profile(config.loop.profile, course.total_steps)
    with torch.device("meta"):
        weights = {"matrix": torch.nn.Parameter(torch.empty(1, 1)), "vector": torch.nn.Parameter(torch.empty(1))}
        config.optimizer.build(parameters=weights)
    model = check_model(config)
    settings: TrainerSettings = config.trainer.build()
    check_stages(config, course, settings)
    if config.trainable == "states":
        tunable_mixers(model)
    data = data_of(course, config.tokenizer.build() if tokenizer is None else tokenizer)
    if not {"train", "validation"} <= set(data.splits):
        raise DataError(
            f"training needs a train and a validation split, and {data.source} has {', '.join(data.splits)}; give "
            "data.corpus.validation files of its own, or a data.corpus.validation_fraction above 0."
        )
    tasks_of(config, model.mixers(), folders)
    check_stop_at_recall(config, data)
    each_part(course, lambda part: check_positions(model, part.config, settings.slices))
    check_adversarial(config, model, settings)
    check_objective(config, course)
    if config.loop.carry_state:
        check_carries(model, data.reads_on, data.source, "order" in config.data.settings)
    return settings, data


def quieten() -> None:
    """Silence advice of Lightning and torch that does not apply here, since our loop does these things itself."""
    silence_advice()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # its output is never changed in place


def seed_everything(seed: int, num_threads: int | None = None) -> None:
    """Seed torch, NumPy and Python; the weights and every drawn buffer follow from `seed`."""
    import random

    import numpy as np

    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def _module(
    config: TrainConfig, model: LanguageModel, settings: TrainerSettings, everyone: Processes, step: int
) -> TrainingModule:
    if settings.slices > 1:
        warn_of_whole_rows(model, config.loop.carry_state)
    if settings.on_gpu and settings.precision_in_use == "32-true":
        notice_float32_on_gpu("trainer.precision=32-true", "trainer.precision=bf16-mixed")
    carried = None
    if config.loop.carry_state:
        carried = CarriedState(model, config.batch_size)
        anew = layers_begun_anew(model)
        if anew is not None:
            notice(f"loop.carry_state=true: {anew} each window anew, since the state would grow without bound.")
    if model.activation_offload and not settings.on_gpu:
        notice("model.activation_offload=true: nothing is offloaded on a CPU, whose memory is the host's.")
    if settings.compiles:
        # A mixer's statistics are those of the first pass; without this, a block that gathers some is not compiled.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        for block in model.blocks:
            block.compile()
    loop = config.loop
    spikes = None
    if loop.spike_sigma is not None:
        spikes = SpikeGuard(loop.spike_sigma, loop.spike_window, stops=loop.spike_action == "stop")
    course = course_of(config)
    distillation = None
    if needs_teacher(course, step):
        distillation = Distillation(model, teacher_of(config), course, step)
    return TrainingModule(
        model,
        lambda parameters: config.optimizer.build(parameters=parameters),
        schedule_of(course),
        total_steps=course.total_steps,
        micro_batch_size=settings.micro_batch_size,
        gradient_clip=loop.gradient_clip,
        skip_nonfinite=loop.nonfinite == "skip",
        max_skips=loop.max_skips,
        slices=settings.slices,
        timeout=settings.timeout,
        processes=everyone,
        carried=carried,
        average=None if loop.ema_decay is None else WeightAverage(loop.ema_decay),
        z_loss=loop.z_loss,
        spikes=spikes,
        attacks=attacked_steps(config, model),
        distillation=distillation,
    )


def _supervisor(
    config: TrainConfig, data: TrainingData, start: Start, is_first: bool, tasks: list[TaskDuring]
) -> Supervisor:
    provenance = Provenance(tokenizer=data.tokenizer.state(), data_fingerprint=data.fingerprint(), versions=versions())
    metric_log = config.logger.build() if is_first else NoLog()
    progress = ProgressDisplay(course_of(config).total_steps, start.step, enabled=is_first)
    store = CheckpointStore(start.folder / "checkpoints")
    during = TasksDuring(config, tasks, start.folder, progress.message)
    return Supervisor(config, data, store, metric_log, progress, provenance, start.saved, during)


def _fit_logged(
    settings: TrainerSettings,
    module: TrainingModule,
    data: TrainingData,
    supervisor: Supervisor,
    start: Start,
    is_first: bool,
) -> None:
    """Open the log, train the remaining steps, close the log."""
    config, metric_log = supervisor.config, supervisor.metric_log
    facts = {
        "parameters": module.model.parameter_counts(),
        "training_flops_per_token": mean_flops_per_token(module.model, course_of(config)),
        "train_tokens_per_epoch": data.train_tokens_per_epoch,
        "versions": supervisor.provenance.versions,
    }
    metric_log.open(start.folder, flattened(plain(config) | facts), config.name, start.step)
    exit_code = 1
    try:
        if is_first:
            with storage_errors(start.folder / SUMMARY_FILE):
                (start.folder / SUMMARY_FILE).unlink(missing_ok=True)  # what is there is of fewer steps
        with connection.losses_explained(settings.timeout, start.folder):
            _fit(settings, module, data, supervisor, start)
        exit_code = 0
    finally:
        metric_log.close(exit_code)


def _fit(
    settings: TrainerSettings, module: TrainingModule, data: TrainingData, supervisor: Supervisor, start: Start
) -> None:
    from lightning.pytorch import Trainer

    steps = supervisor.loop.profile if process_rank() == 0 else None
    data.start_step, data.num_steps = start.step, module.total_steps
    data.processes_per_row = settings.slices
    trainer = Trainer(
        accelerator="gpu" if settings.on_gpu else "cpu",
        devices=settings.devices_here,
        num_nodes=settings.world_size // settings.devices_here,
        plugins=[connection.cluster_environment()],
        strategy=strategy_of(settings),
        precision=settings.precision_in_use,
        max_epochs=1,
        callbacks=profiled(supervisor, steps, start.folder, settings.compiles),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    # its handler would exchange a word with processes that may be gone
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    kept = contextlib.nullcontext() if settings.on_gpu else freed_memory_kept()
    with supervisor.signals.noting(worth_saving=False), kept:
        try:
            trainer.fit(module, datamodule=data)
        except SystemExit as end:  # which Lightning makes of Ctrl-C
            if isinstance(end.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
        finally:
            supervisor.close()


def strategy_of(settings: TrainerSettings) -> Any:
    """The strategy for Lightning's `Trainer`."""
    if settings.strategy == "single":
        return "auto"
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    timeout = timedelta(seconds=settings.timeout)
    if settings.strategy == "ddp":
        return DDPStrategy(timeout=timeout)
    return ModelParallelStrategy(data_parallel_size=settings.world_size, tensor_parallel_size=1, timeout=timeout)
