"""A run that writes checkpoints in the background learns soon that one failed, and waits for one before it ends."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longmix.checkpoints import CheckpointStore, store
from longmix.distributed.signals import SignalWatch
from longmix.errors import NonFiniteError, StorageError
from longmix.training.module import TrainingModule
from longmix.training.run import train

Runs = Callable[..., Path]


@pytest.fixture
def run(compose_config, tiny_overrides, tmp_path) -> Runs:
    """`run(...)` trains for nine steps and saves after the fifth and the last, in the background."""

    def trained(*overrides: str) -> None:
        words = ["max_steps=9", "loop.checkpoint_every=5", "loop.validate_every=null", "loop.async_checkpoints=true"]
        train(compose_config(*tiny_overrides, "mixer=flash", "seq_len=16", *words, *overrides))

    return trained


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """The steps that were taken; those after the first checkpoint take their time."""
    taken: list[int] = []
    original = TrainingModule.training_step

    def slow(self, batch, batch_idx):
        original(self, batch, batch_idx)
        taken.append(self.step)
        time.sleep(0.3 if self.step > 5 else 0)

    monkeypatch.setattr(TrainingModule, "training_step", slow)
    return taken


def test_a_failed_checkpoint_ends_the_run_at_the_next_step(run, steps, monkeypatch, tmp_path):
    def full(self, state, info):
        raise StorageError("could not write it: no room.")

    monkeypatch.setattr(CheckpointStore, "save", full)
    with pytest.raises(StorageError, match="no room"):
        run()
    assert steps[-1] in (6, 7)
    assert CheckpointStore(tmp_path / "checkpoints").all() == []


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_checkpoint_that_was_being_written(run, steps, monkeypatch, tmp_path):
    original = store.atomic_directory

    @contextlib.contextmanager
    def slow(target):
        time.sleep(0.6)
        with original(target) as folder:
            yield folder

    monkeypatch.setattr(store, "atomic_directory", slow)
    clip = TrainingModule._clip

    def poisoned(self, record):
        clip(self, record)
        if self.step == 5:
            record.loss = torch.tensor(torch.nan)

    monkeypatch.setattr(TrainingModule, "_clip", poisoned)
    with pytest.raises(NonFiniteError):
        run()
    assert [path.name for path in CheckpointStore(tmp_path / "checkpoints").all()] == ["step-00000005"]


@pytest.mark.slow
def test_all_checkpoints_are_there_when_a_run_ends(run, steps, tmp_path):
    run()
    assert steps == list(range(1, 10))
    found = CheckpointStore(tmp_path / "checkpoints").all()
    assert [path.name for path in found] == ["step-00000005", "step-00000009"]


def test_a_failure_counts_for_more_than_a_signal():
    watch, cpu = SignalWatch(), torch.device("cpu")
    assert not watch.anywhere(cpu)
    assert watch.anywhere(cpu, failed=True)
    assert watch.received is None
