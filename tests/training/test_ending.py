"""A signal at each moment of a run ends it with its state saved, and the run goes on to the same bits."""

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from longmix.checkpoints import CheckpointStore, load_checkpoint
from longmix.data.text_data import TokenData
from longmix.distributed.signals import SIGNALS, resumable
from longmix.errors import Interrupted
from longmix.files import _host
from longmix.metrics import read_metrics
from longmix.training import run as run_module
from longmix.training import supervisor as supervisor_module
from longmix.training.module import TrainingModule

STEPS = 8
WORDS = ["seq_len=32", f"max_steps={STEPS}", "loop.log_every=1", "loop.validate_every=4", "loop.checkpoint_every=3"]
WORDS += ["loop.keep_checkpoints=9", "trainer.num_threads=1", "mixer=flash"]


@pytest.fixture(scope="module")
def train(tiny_overrides, composed) -> Callable[..., dict]:
    """`train(folder, words)` as train.py does, in this process."""

    def run(folder: Path, *words: str) -> dict:
        try:
            overrides = [word for word in tiny_overrides if not word.startswith("max_steps")]
            return resumable(run_module.train)(composed([*overrides, *WORDS, *words], "train", folder))
        finally:
            HydraConfig.instance().cfg = None

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of a run; nothing is beside it that resume=auto could find."""
    return tmp_path / "runs/run"


@pytest.fixture(scope="module")
def straight(train, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(folder)
    return folder


def steps_saved(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in CheckpointStore(folder / "checkpoints").all()]


def before(place: object, name: str, action: Callable, monkeypatch, when: Callable = lambda *_: True) -> None:
    """Call `action` once, before the call of `name` for whose arguments `when` holds."""
    original, done = getattr(place, name), []

    def changed(*arguments, **settings):
        if not done and when(*arguments):
            done.append(True)
            action()
        return original(*arguments, **settings)

    monkeypatch.setattr(place, name, changed)


def step_is(step: int) -> Callable:
    return lambda module, *_: module.step == step


def validates_at(step: int) -> Callable:
    return lambda supervisor, trainer, module: module.step == step


MOMENTS = {
    "data": (TokenData, "prepare_data", lambda *_: True, [], "first step"),
    "building": (run_module, "build_model", lambda *_: True, [], "first step"),
    "start": (supervisor_module.Supervisor, "on_train_start", lambda *_: True, [], "first step"),
    "step": (TrainingModule, "training_step", step_is(4), [3, 5], "after step 5 of 8"),
    "last-step": (TrainingModule, "training_step", step_is(7), [3, 6, 8], "before its last validation"),
    "saving": (CheckpointStore, "save", lambda *_: True, [3, 4], "after step 4 of 8"),
    "validation": (supervisor_module.Supervisor, "validate", validates_at(4), [3, 4], "after step 4 of 8"),
    "last-validation": (supervisor_module.Supervisor, "validate", validates_at(8), [3, 6, 8], "last validation"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("moment", "number"), list(zip(MOMENTS, itertools.cycle(SIGNALS), strict=False)))
def test_a_signal_at_any_moment_saves_and_the_run_goes_on_to_the_same_bits(
    moment, number, train, straight, folder, monkeypatch
):
    place, name, when, saved, text = MOMENTS[moment]
    before(place, name, lambda: os.kill(os.getpid(), number), monkeypatch, when)
    with pytest.raises(Interrupted, match=text) as stopped:
        train(folder)
    assert number.name in str(stopped.value)
    assert steps_saved(folder) == saved
    assert not (folder / "summary.json").exists()
    train(folder, "resume=auto")
    assert_same_run(folder, straight)


def losses(folder: Path) -> list[list[float]]:
    columns = ("step", "train/loss", "validation/loss")
    return sorted([row.get(column, 0.0) for column in columns] for row in read_metrics(folder))


def assert_same_run(folder: Path, straight: Path) -> None:
    ours, theirs = (load_checkpoint(path / f"checkpoints/step-{STEPS:08d}") for path in (folder, straight))
    assert all(torch.equal(ours["model"][name], weight) for name, weight in theirs["model"].items())
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (folder, straight))
    assert ours["validation"] == theirs["validation"]
    assert ours["validation"]["step"] == ours["steps"] == STEPS
    assert ours["validation_by_position"] == theirs["validation_by_position"]
    columns = ("step", "train/loss", "validation/loss")
    ours, theirs = (
        sorted([row.get(column, 0.0) for column in columns] for row in read_metrics(path))
        for path in (folder, straight)
    )
    assert ours == theirs


@pytest.mark.slow
def test_a_signal_while_a_run_is_restored_comes_before_its_first_step(train, straight, folder, monkeypatch):
    before(TrainingModule, "training_step", lambda: os.kill(os.getpid(), signal.SIGUSR1), monkeypatch, step_is(4))
    with pytest.raises(Interrupted):
        train(folder)
    before(TrainingModule, "restore", lambda: os.kill(os.getpid(), signal.SIGUSR2), monkeypatch)
    with pytest.raises(Interrupted, match="SIGUSR2 came before this command's first step"):
        train(folder, "resume=auto")
    train(folder, "resume=auto")
    assert_same_run(folder, straight)


@pytest.mark.parametrize("stale", [{}, {"step": 4, "loss": 1.0, "bits_per_byte": 1.0}], ids=["empty", "of-an-earlier"])
def test_a_run_that_ended_without_its_last_validation_gets_it(stale, train, straight, folder, monkeypatch):
    before(supervisor_module.Supervisor, "validate", lambda: os.kill(os.getpid(), 15), monkeypatch, validates_at(STEPS))
    with pytest.raises(Interrupted):
        train(folder)
    (folder / "summary.json").write_text(json.dumps({"validation": stale}))
    train(folder, "resume=auto")
    assert_same_run(folder, straight)


def test_killed_behind_the_last_validation_it_is_not_done_again(train, straight, folder, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(run_module, "write_summary", lambda *_: exit(9))
        train(folder)
    monkeypatch.setattr(supervisor_module.Supervisor, "validate", None)
    train(folder, "resume=auto")
    assert_same_run(folder, straight)


def test_killed_between_the_figures_of_a_validation_and_its_checkpoint_they_are_noted_once(
    train, straight, folder, monkeypatch
):
    def killed(_store: CheckpointStore, checkpoint: Path, _figures: dict) -> None:
        (checkpoint / f".info.json.{_host()}.r0123456789abcdef.tmp.lock").touch()  # what replace_file leaves at a kill
        raise SystemExit(9)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(CheckpointStore, "add_info", killed)
        patched.setattr(supervisor_module, "_due", lambda *_: False)
        train(folder)
    train(folder, "resume=auto")
    rows = [row for row in read_metrics(folder) if "validation/loss" in row]
    assert [row["step"] for row in rows] == [STEPS]
    assert not list(folder.rglob("*.tmp*"))


def test_the_last_checkpoint_has_its_validation_and_so_may_be_the_best(straight):
    store = CheckpointStore(straight / "checkpoints")
    assert store.best() == store.latest()


def test_a_second_ctrl_c_acts_at_once(train, folder, monkeypatch):
    monkeypatch.setattr("longmix.distributed.signals.SAME_PRESS_SECONDS", -1.0)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before(TrainingModule, "training_step", twice, monkeypatch, step_is(4))
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(folder)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert steps_saved(folder) == [3]


def test_a_signal_behind_the_end_changes_nothing(train, folder, monkeypatch):
    before(run_module, "write_summary", lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    train(folder)
    assert json.loads((folder / "summary.json").read_text())["validation"]["step"] == STEPS
