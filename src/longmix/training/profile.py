"""`loop.profile=STEP`: a trace of that step, a snapshot of its memory, and the shares of its time.

Only the step that is profiled pays for it: the model's parts get hooks at its beginning, which mark in the trace what
runs, and lose them at its end. Nothing that is computed changes. `longmix.training.trace` reads the shares off.
"""

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.hooks import RemovableHandle

from longmix.errors import ConfigError, StorageError
from longmix.files import replace_file, replace_json
from longmix.model.backbone import LanguageModel
from longmix.model.blocks import Block
from longmix.progress import ProgressDisplay
from longmix.training.module import TrainingModule
from longmix.training.supervisor import Supervisor
from longmix.training.trace import (
    CHANNELS,
    CLASSES,
    DATA,
    HEAD,
    LINEAR,
    MARK,
    MIXER,
    NORMS,
    STEP,
    Shares,
    shares_of,
)

FOLDER = "profile"
"""In the run's folder."""

MEMORY_EVENTS = 1_000_000
"""The most allocations and releases in the snapshot of a GPU's memory."""

log = logging.getLogger(__name__)


def steps_of(word: int | list[int] | None) -> list[int]:
    """The steps that `loop.profile` names, counted from 1."""
    return word if isinstance(word, list) else [] if word is None else [word]


def check_profile(word: int | list[int] | None, total_steps: int) -> None:
    """Refuse steps that the run does not take.

    Raises:
        ConfigError: naming the word.
    """
    beyond = [step for step in steps_of(word) if step > total_steps]
    if beyond:
        raise ConfigError(f"loop.profile={beyond[0]} names a step that the run does not take; it takes {total_steps}.")


def profiled(supervisor: Supervisor, word: int | list[int] | None, run: Path, compiled: bool) -> list[Callback]:
    """The callbacks of a run whose `loop.profile` is `word`: the supervisor, and what is before and after it.

    Args:
        supervisor: the run's.
        word: of this process; one that is not to profile gets None.
        run: the run's folder.
        compiled: whether blocks are compiled.
    """
    if not steps_of(word):
        return [supervisor]
    profiler = StepProfiler(steps_of(word), run / FOLDER, compiled, supervisor)
    return [profiler, supervisor, _Begin(profiler)]


class StepProfiler(Callback):
    """Profiles steps from the end of the one before, so that reading the data is part of them.

    Args:
        steps: counted from 1.
        folder: gets the files.
        compiled: whether blocks are compiled.
        supervisor: its clock stands still while files are written.
    """

    def __init__(self, steps: Sequence[int], folder: Path, compiled: bool, supervisor: Supervisor) -> None:
        self.steps, self.folder, self.compiled, self.supervisor = steps, folder, compiled, supervisor
        self.recording: Recording | None = None

    def begin(self, module: TrainingModule) -> None:
        """Record the next step if it is one of those; called once nothing is left to do for the last one."""
        if module.step + 1 in self.steps and module.step < module.total_steps:
            self.recording = Recording(module.model, module.device, self.compiled)
            self.supervisor.clock = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The data are there."""
        if self.recording is not None:
            self.recording.has_data()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write the files and print the table of a step that was recorded."""
        if self.recording is None:
            return
        recording, self.recording = self.recording, None
        recording.stop()
        began = time.perf_counter()
        step = cast(TrainingModule, pl_module).step
        try:
            show(recording.write(self.folder, step), step, self.folder, self.supervisor.progress)
        except (StorageError, OSError, ValueError) as error:  # no reason to end a run
            log.warning("The profile of step %d could not be written: %s", step, error)
        self.supervisor.clock += time.perf_counter() - began

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind of a step that did not end."""
        if self.recording is not None:
            self.recording.stop()
            self.recording = None


class _Begin(Callback):
    """Begins what another callback ends, after all others."""

    def __init__(self, profiler: StepProfiler) -> None:
        self.profiler = profiler

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.profiler.begin(cast(TrainingModule, pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.profiler.begin(cast(TrainingModule, pl_module))


class Recording:
    """Records from now on.

    Args:
        model: its parts are marked.
        device: that trains.
        compiled: whether blocks are compiled; then no mark reaches into them.
    """

    def __init__(self, model: LanguageModel, device: torch.device, compiled: bool) -> None:
        self.device, self.on_gpu, self.compiled = device, device.type == "cuda", compiled
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it has lines of its own on the terminal otherwise
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        self.handles = mark_parts(model, compiled)
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            torch.cuda.synchronize(device)
        self.profile = profile(activities=activities, profile_memory=True, acc_events=True)
        self.profile.start()
        self.ranges = [_opened(STEP), _opened(MARK + DATA)]

    def has_data(self) -> None:
        """End the range of the data."""
        if len(self.ranges) == 2:
            _close(self.ranges)

    def stop(self) -> None:
        """End the recording and remove all hooks."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        while self.ranges:
            _close(self.ranges)
        self.profile.stop()
        for handle in self.handles:
            handle.remove()

    def write(self, folder: Path, step: int) -> Shares:
        """Write the trace, the snapshot of a GPU's memory, and the shares; returns these."""
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step-{step:08d}"
        if self.on_gpu:
            replace_file(folder / f"{name}.memory.pickle", lambda path: torch.cuda.memory._dump_snapshot(str(path)))
            torch.cuda.memory._record_memory_history(enabled=None)
        trace = folder / f"{name}.trace.json"
        replace_file(trace, lambda path: self.profile.export_chrome_trace(str(path)))
        with trace.open(encoding="utf-8") as file:
            shares = shares_of(json.load(file))
        replace_json(folder / f"{name}.json", _content(shares, step, self.compiled))
        return shares


def _content(shares: Shares, step: int, compiled: bool) -> dict[str, Any]:
    return {
        "step": step,
        "seconds": shares.seconds,
        "shares": {name: share for name, _, share in shares.rows()},
        "seconds_of_training_thread": shares.host,
        "seconds_of_gpu": shares.device,
        "compiled": compiled,
        "memory": {"peak_bytes": shares.peak_bytes, "bytes_by_class": shares.peak_by_class},
        "slowest": [
            {"name": name, "seconds": seconds, "calls": calls} for name, (seconds, calls) in shares.slowest.items()
        ],
    }


def show(shares: Shares, step: int, folder: Path, progress: ProgressDisplay) -> None:
    """Print the table of a step."""
    where = "GPU" if shares.device else "CPU"
    progress.message(f"profile of step {step}, {1e3 * shares.seconds:,.1f} ms by class of operation on the {where}:")
    width = max(map(len, CLASSES))
    for name, seconds, share in shares.rows():
        progress.message(f"  {name:{width}}  {1e3 * seconds:>10,.1f} ms  {share:>6.1%}")
    largest = sorted(shares.peak_by_class.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {size / max(shares.peak_bytes, 1):.0%}" for name, size in largest)
    progress.message(f"  its memory at most: {shares.peak_bytes / 2**20:,.1f} MiB ({parts})")
    progress.message(f"  trace for ui.perfetto.dev: {folder / f'step-{step:08d}.trace.json'}")


def mark_parts(model: LanguageModel, compiled: bool) -> list[RemovableHandle]:
    """Give the model's parts hooks that mark in a trace what runs, until they are removed.

    Args:
        model: any; parts of it may be divided over processes.
        compiled: whether blocks are compiled; their parts get none, which would have them compiled anew.
    """
    blocks = [cast(Block, block) for block in model.blocks]
    inside = {part for block in blocks for part in block.modules()}
    classes: dict[nn.Module, str] = {part: name for part in model.modules() if (name := _class_of(part)) is not None}
    classes[model.embedding] = HEAD
    for block in blocks:
        classes |= {block.mixer: MIXER, block.mlp: CHANNELS}
    handles = []
    for part, name in classes.items():
        if not (compiled and part in inside):
            handles += _between(part, part, name)
    return handles + _between(model.norm, model, HEAD, after_first=True)


def _class_of(part: nn.Module) -> str | None:
    if isinstance(part, nn.Linear):
        return LINEAR
    return NORMS if type(part).__name__.endswith("Norm") else None


def _between(first: nn.Module, last: nn.Module, name: str, after_first: bool = False) -> list[RemovableHandle]:
    """Mark what runs from the beginning of `first`, or its end, to the end of `last`, also where that raises."""
    ranges: list[record_function] = []

    def begin(*_: Any) -> None:
        ranges.append(_opened(MARK + name))

    def end(*_: Any) -> None:
        if ranges:
            _close(ranges)

    beginning = first.register_forward_hook(begin) if after_first else first.register_forward_pre_hook(begin)
    return [beginning, last.register_forward_hook(end, always_call=True)]


def _opened(name: str) -> record_function:
    opened = record_function(name)
    opened.__enter__()
    return opened


def _close(ranges: list[record_function]) -> None:
    ranges.pop().__exit__(None, None, None)
