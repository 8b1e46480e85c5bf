"""NaN and infinity, wherever they come from: no checkpoint holds them, and the run says so with its exit code."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from longmix.checkpoints import CheckpointStore, load_checkpoint, read_info
from longmix.checkpoints.tensors import split
from longmix.config import ModelConfig, resolved
from longmix.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError
from longmix.model.build import build_model
from longmix.training import run as run_module
from longmix.training import supervisor as supervisor_module
from longmix.training import validation as validation_module
from longmix.training.diagnosis import nonfinite_tensor
from longmix.training.module import TrainingModule

WORDS = ["seq_len=32", "max_steps=9", "loop.log_every=1", "loop.validate_every=null", "loop.checkpoint_every=3"]
WORDS += ["loop.keep_checkpoints=1", "trainer.num_threads=1", "mixer=flash"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs/run"


@pytest.fixture
def train(tiny_overrides, composed, folder) -> Callable[..., dict]:
    """`train(words)` in the test's folder, in this process."""

    def run(*words: str) -> dict:
        try:
            overrides = [word for word in tiny_overrides if not word.startswith("max_steps")]
            return run_module.train(composed([*overrides, *WORDS, *words], "train", folder))
        finally:
            HydraConfig.instance().cfg = None

    return run


def checkpoints(folder: Path) -> dict[int, dict]:
    found = CheckpointStore(folder / "checkpoints").all()
    return {int(path.name.removeprefix("step-")): load_checkpoint(path) for path in found}


def assert_finite(folder: Path) -> None:
    for state in checkpoints(folder).values():
        tensors, _ = split({"model": state["model"], "optimizers": state["optimizers"]})
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())


def spoil_gradient(module: TrainingModule, value: float) -> None:
    module.model.blocks[0].mlp.down.register_forward_hook(
        lambda _layer, _inputs, output: output.register_hook(lambda gradient: gradient * value) and None
    )


def spoil_weight(module: TrainingModule, value: float) -> None:
    with torch.no_grad():
        module.model.blocks[0].mlp.down.weight[0, 0] = value


def spoil_state(module: TrainingModule, value: float) -> None:
    """The last value of each optimizer's first weight: with AdamW the second moment, which then freezes its weight."""
    for optimizer in module.trainer.optimizers:
        state = next(iter(optimizer.state.values()))
        key = [key for key, tensor in state.items() if torch.is_tensor(tensor) and tensor.numel() > 1][-1]
        state[key].view(-1)[0] = value


SPOILED = {"gradient": spoil_gradient, "weight": spoil_weight, "state": spoil_state}


def spoil(kind: str, value: float, monkeypatch, step: int = 4) -> None:
    """Before the step behind `step`, which lies between the checkpoints 3 and 6."""
    original = TrainingModule.training_step

    def training_step(self, batch, batch_idx):
        if self.step == step:
            SPOILED[kind](self, value)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", training_step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "value", "optimizer", "nonfinite"),
    [
        ("gradient", math.nan, "muon", "stop"),
        ("gradient", math.inf, "adamw", "skip"),
        ("weight", math.nan, "muon", "skip"),
        ("weight", math.inf, "adamw", "stop"),
        ("weight", math.nan, "adamw", "skip"),
        ("state", math.nan, "muon", "stop"),
        ("state", math.inf, "muon", "skip"),
        ("state", math.inf, "adamw", "stop"),
        ("state", math.inf, "adamw", "skip"),
        ("state", math.nan, "adamw", "skip"),
    ],
)
def test_nothing_that_is_not_finite_is_saved_and_the_run_goes_on(
    kind, value, optimizer, nonfinite, train, folder, monkeypatch
):
    words = [f"optimizer={optimizer}", f"loop.nonfinite={nonfinite}", "loop.max_skips=2"]
    with monkeypatch.context() as patched:
        spoil(kind, value, patched)
        with pytest.raises(NonFiniteError, match="step-00000003; run the same command with resume=auto") as stopped:
            train(*words)
    assert stopped.value.exit_code == 3
    assert list(checkpoints(folder)) == [3]
    assert_finite(folder)
    assert not (folder / "summary.json").exists()
    assert train(*words, "resume=auto")["validation"]["step"] == 9
    assert_finite(folder)


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("rate", ["1e20", "1e30", "1e38"])
def test_a_rate_at_which_weights_overflow(rate, nonfinite, train, folder):
    with pytest.raises(NonFiniteError):
        train("optimizer=adamw", f"optimizer.learning_rate={rate}", f"loop.nonfinite={nonfinite}", "loop.max_skips=2")
    assert_finite(folder)
    assert not (folder / "summary.json").exists()


def test_a_single_step_is_left_out(train, folder, monkeypatch):
    original = TrainingModule._accumulate

    def accumulate(self, batch):
        record = original(self, batch)
        if self.step == 4:
            record.loss = record.loss * math.nan
        return record

    monkeypatch.setattr(TrainingModule, "_accumulate", accumulate)
    train("loop.nonfinite=skip", "loop.max_skips=2")
    assert checkpoints(folder)[9]["steps_skipped"] == 1
    assert_finite(folder)


class TestRowOfSkippedSteps:
    """Its weights are those of the step before it, and may be past recovery: it pushes out no older checkpoint."""

    WORDS = ("loop.nonfinite=skip", "loop.keep_checkpoints=1", "max_steps=60")

    @pytest.fixture
    def skipping(self, monkeypatch):
        """`skipping(range(4, 9), signal_at=6)` skips the steps behind these, and signals in one."""
        original = TrainingModule._accumulate

        def skip(steps, signal_at=None):
            def accumulate(self, batch):
                record = original(self, batch)
                if self.step in steps:
                    record.loss = record.loss * math.nan
                if self.step == signal_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                return record

            monkeypatch.setattr(TrainingModule, "_accumulate", accumulate)

        return skip

    @pytest.mark.slow
    def test_it_leaves_the_checkpoint_before_it_and_names_one_to_go_back_to(self, train, folder, skipping):
        skipping(range(8, 60))
        words = (*self.WORDS, "loop.keep_checkpoints=2")
        with pytest.raises(NonFiniteError, match=r"20 steps in a row .*The last checkpoint is .*step-00000006"):
            train(*words)
        assert list(checkpoints(folder)) == [3, 6]
        skipping(range(6, 60))
        older = CheckpointStore(folder / "checkpoints").path(3)
        with pytest.raises(NonFiniteError, match=r"No step was taken since .*step-00000006, from which") as failed:
            train(*words, "resume=auto")
        assert f"go back with resume={older} name=" in str(failed.value)
        assert list(checkpoints(folder)) == [3, 6]

    def test_a_checkpoint_that_was_due_comes_with_the_next_step_taken(self, train, folder, skipping):
        skipping(range(5, 7))
        train("loop.nonfinite=skip", "loop.keep_checkpoints=9")
        assert list(checkpoints(folder)) == [3, 8, 9]

    @pytest.mark.slow
    def test_one_that_a_signal_asks_for_stands_beside_the_others(self, train, folder, skipping):
        skipping(range(4, 60), signal_at=13)
        with pytest.raises(Interrupted):
            train(*self.WORDS)
        store = CheckpointStore(folder / "checkpoints")
        assert [path.name for path in store.all()] == ["step-00000003", "step-00000014"]
        assert read_info(store.latest())["skips_in_a_row"] == 10
        skipping(range(14, 60), signal_at=16)
        with pytest.raises(Interrupted):
            train(*self.WORDS, "resume=auto")
        assert [path.name for path in store.all()] == ["step-00000003", "step-00000017"]
        assert checkpoints(folder)[17]["skips_in_a_row"] == 13
        with pytest.raises(NonFiniteError, match=r"at step 24, 20 steps in a row .*resume=.*step-00000003"):
            train(*self.WORDS, "resume=auto")  # the row goes on
        skipping(())
        train(*self.WORDS, "resume=auto", "max_steps=19")
        assert [path.name for path in store.all()] == ["step-00000019"]

    @pytest.mark.slow
    def test_one_of_an_earlier_version_says_nothing_of_a_row(self, train, folder, monkeypatch):
        capture = TrainingModule.capture
        with monkeypatch.context() as patched:
            patched.setattr(
                TrainingModule,
                "capture",
                lambda self: {key: value for key, value in capture(self).items() if key != "skips_in_a_row"},
            )
            train("max_steps=3")
        assert train("max_steps=6", "resume=auto")["steps"] == 6


def test_a_last_validation_that_is_no_number_is_no_success(train, folder, monkeypatch):
    original = validation_module.evaluate_loss

    def evaluate_loss(model, batches, statistics, **settings):
        statistics.loss_by_position += math.nan
        return original(model, batches, statistics, **settings)

    monkeypatch.setattr(validation_module, "evaluate_loss", evaluate_loss)
    for words in ([], ["resume=auto"]):
        with pytest.raises(NonFiniteError, match="the validation after the last step, 9, gave a loss of nan"):
            train(*words)
        assert not (folder / "summary.json").exists()
        assert 9 in checkpoints(folder)


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_that_is_not_finite_is_refused_by_name(train, folder, monkeypatch):
    with monkeypatch.context() as patched:
        spoil("weight", math.nan, patched, step=6)
        patched.setattr(supervisor_module, "nonfinite_tensor", lambda *_: None)
        patched.setattr(TrainingModule, "training_step", ending_behind(7, TrainingModule.training_step))
        with pytest.raises(KeyError):
            train("loop.checkpoint_every=1", "loop.nonfinite=skip", "loop.max_skips=9")
    with pytest.raises(CheckpointError, match=r"step-0000000\d cannot be continued: the weight .* is not finite"):
        train("resume=auto")


def ending_behind(step: int, original: Callable) -> Callable:
    """Skips what is not finite and saves all the same, as earlier versions did, and ends the run behind `step`."""

    def training_step(self, batch, batch_idx):
        self._check_skips = lambda finite: None
        if self.step == step:
            raise KeyError
        original(self, batch, batch_idx)
        self.skips_in_a_row = 0

    return training_step


def test_what_is_not_finite_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = {"state": {"0.weight": {"exp_avg": torch.zeros(2, 2), "step": torch.tensor(1.0)}}}
    state = {"model": model.state_dict(), "optimizers": [optimizer]}
    assert nonfinite_tensor(state) is None
    optimizer["state"]["0.weight"]["exp_avg"][1, 1] = -math.inf
    assert nonfinite_tensor(state) == "exp_avg of the weight 0.weight in the optimizer"
    model[1].running_mean[0] = math.nan
    assert nonfinite_tensor(state) == "the weight 1.running_mean"
    assert nonfinite_tensor({"model": {"empty": torch.zeros(0), "counts": torch.ones(2).long()}}) is None


@pytest.mark.slow
def test_every_mixer_begins_finite(compose_config):
    for path in sorted((Path(__file__).parents[2] / "configs/mixer").glob("*.yaml")):
        node = resolved(compose_config(f"mixer={path.stem}", "model.num_layers=1", "model.d_model=128"))
        assert nonfinite_tensor({"model": build_model(ModelConfig.of(node), 20).state_dict()}) is None, path.stem


def test_max_skips_is_at_least_one(train):
    with pytest.raises(ConfigError, match=r"loop\.max_skips"):
        train("loop.max_skips=0")


def test_a_first_step_that_fails_names_an_older_checkpoint(train, folder, monkeypatch):
    train("max_steps=6", "loop.keep_checkpoints=9")
    restore = TrainingModule.restore
    monkeypatch.setattr(
        TrainingModule, "restore", lambda self, *parts: (restore(self, *parts), spoil_gradient(self, math.inf))
    )
    older = CheckpointStore(folder / "checkpoints").path(3)
    with pytest.raises(NonFiniteError, match=r"first step from .*step-00000006, from which nothing goes on") as failed:
        train("resume=auto")
    assert f"go back with resume={older} name=" in str(failed.value)
