"""Steps whose loss or gradient norm jumps: left out or the end of the run, and nothing of them in the state."""

import os
import signal

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from longmix.checkpoints import CheckpointStore, load_checkpoint
from longmix.checkpoints.tensors import split
from longmix.errors import ConfigError, Interrupted, SpikeError
from longmix.metrics import read_metrics
from longmix.training import run as run_module
from longmix.training.module import TrainingModule
from longmix.training.spikes import SpikeGuard

WORDS = ["seq_len=32", "max_steps=9", "loop.log_every=1", "loop.validate_every=null", "loop.checkpoint_every=100"]
WORDS += ["trainer.num_threads=1", "loop.spike_sigma=20", "loop.spike_window=4"]


@pytest.fixture
def train(tiny_overrides, composed, tmp_path):
    """`train(name, words)` in this process, and the state of its last checkpoint; of lengths the words' hold."""

    def run(name: str, *words: str) -> dict:
        try:
            left_out = ("max_steps", "seq_len") if any(word.startswith("stages") for word in words) else ()
            overrides = [word for word in tiny_overrides if not word.startswith("max_steps")]
            own = [word for word in WORDS if not word.startswith(left_out)] if left_out else WORDS
            folder = tmp_path / "runs" / name
            run_module.train(composed([*overrides, *own, *words], "train", folder))
        finally:
            HydraConfig.instance().cfg = None
        return load_checkpoint(CheckpointStore(folder / "checkpoints").latest())

    return run


@pytest.fixture
def spoiled(monkeypatch):
    """`spoiled(field, steps, factor, signal_at)`: these steps, counted from 1, have a larger loss or gradient."""
    original, clip = TrainingModule._accumulate, TrainingModule._clip

    def spoil(field: str, steps, factor: float = 1e3, signal_at: int | None = None) -> None:
        def accumulate(self, batch):
            record = original(self, batch)
            if self.step + 1 == signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
            if field == "loss" and self.step + 1 in steps:
                record.loss = record.loss * factor
            return record

        def clipped(self, record):
            if field == "gradient" and self.step + 1 in steps:
                for weight in self.model.parameters():
                    weight.grad.mul_(factor)
            clip(self, record)

        monkeypatch.setattr(TrainingModule, "_accumulate", accumulate)
        monkeypatch.setattr(TrainingModule, "_clip", clipped)

    return spoil


def tensors_of(state: dict) -> dict[str, torch.Tensor]:
    return split({"model": state["model"], "optimizers": state["optimizers"]})[0]


def test_a_spike_is_beyond_the_mean_by_so_many_deviations():
    values = torch.tensor([[2.0, 2.1, 1.9, 2.05], [1.0, 1.2, 0.9, 1.1]], dtype=torch.float64)
    guard = SpikeGuard(sigma=3.0, size=4)
    deviation, mean = values.std(1), values.mean(1)
    limit = mean + 3 * deviation
    for step, (loss, norm) in enumerate(values.T):
        assert step < 2 or not guard.judge(loss, norm)
        guard.note(loss, norm)
    for loss, norm, expected in [
        (limit[0] - 1e-9, limit[1] - 1e-9, False),
        (limit[0] + 1e-9, mean[1], True),
        (mean[0], limit[1] + 1e-9, True),
        (mean[0] - 100, mean[1] - 100, False),  # lower is no spike
        (torch.tensor(torch.nan), limit[1] * 9, False),  # not finite is something else
        (torch.tensor(torch.inf), limit[1], False),
    ]:
        assert bool(guard.judge(loss, norm)) is expected
    few = SpikeGuard(3.0, size=8)
    for loss, norm in values.T[:3]:
        few.note(loss, norm)
    assert not few.judge(limit[0] * 9, mean[1])  # less than half a window
    for _ in range(4):
        guard.note(limit[0] * 1e3, mean[1])
    assert not guard.judge(limit[0] * 1e3, mean[1])  # a level that lasts
    again = SpikeGuard(3.0, size=2)
    again.restore(guard.window.tolist())
    assert torch.equal(again.window, guard.window[:, -2:])


@pytest.mark.parametrize(("optimizer", "field"), [("muon", "loss"), ("adamw", "gradient")])
def test_a_spike_is_left_out_whole_and_a_killed_run_goes_on_bit_for_bit(optimizer, field, train, spoiled, tmp_path):
    words = [f"optimizer={optimizer}", "mixer=flash"]
    spoiled(field, {7})
    whole = train("whole", *words)
    spoiled(field, {7}, signal_at=5)
    with pytest.raises(Interrupted):
        train("killed", *words)
    spoiled(field, {7})
    resumed = train("killed", *words, "resume=auto")
    assert whole["spikes"] == resumed["spikes"] and whole["run"]["spikes"] == resumed["run"]["spikes"] == [7]
    assert whole["steps_skipped"] == resumed["steps_skipped"] == 1
    first, second = tensors_of(whole), tensors_of(resumed)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    steps = [tensor for name, tensor in first.items() if name.endswith("/step")]
    assert steps and all(step == 8 for step in steps)
    spoiled(field, {7}, factor=1.0)
    without = tensors_of(train("without", *words))
    assert not torch.equal(first["model/head.weight"], without["model/head.weight"])
    rows = [row for row in read_metrics(tmp_path / "runs/whole") if "train/spikes" in row]
    assert [row["train/spikes"] for row in rows] == [0] * 6 + [1] * 3
    assert [row["train/steps_skipped"] for row in rows] == [0] * 6 + [1] * 3


def test_the_run_stops_where_that_is_asked_for_or_too_many_are_left_out(train, spoiled, tmp_path):
    spoiled("loss", {7})
    reason = r"step 7 gave a loss of .* standard deviations above the mean .* of the last 4 steps"
    with pytest.raises(SpikeError, match=reason) as stopped:
        train("stops", "loop.spike_action=stop")
    assert stopped.value.exit_code == 3
    spoiled("loss", {6})
    with pytest.raises(SpikeError, match=r"at step 6, 1 step in a row .*\(loop.max_skips\)"):
        train("stops", "loop.max_skips=1", "resume=auto", "loop.checkpoint_every=3")
    for words, message in [
        (["loop.spike_sigma=0"], r"loop\.spike_sigma=0.0 must be above 0, or null to look for no spikes"),
        (["loop.spike_window=1"], r"loop\.spike_window=1 must be at least 2"),
    ]:
        with pytest.raises(ConfigError, match=message):
            train("refused", *words)


def test_a_stage_begins_another_window_and_goes_on_with_the_averaged_weights(train):
    words = ["stages=[{seq_len:32,max_steps:5},{seq_len:64,max_steps:3}]", "loop.ema_decay=0.9"]
    state = train("staged", *words)
    assert [len(values) for values in state["spikes"]] == [3, 3]
    assert state["ema_updates"] == 8


def test_a_window_that_no_run_can_have_written_is_refused(train):
    from longmix.checkpoints.contents import check_run_state

    state = train("whole", "max_steps=2")
    assert [len(values) for values in state["spikes"]] == [2, 2]
    check_run_state(state)
    for damaged in ([[1.0]], [[1.0], [1.0, 2.0]], [["a"], [1.0]], [[float("nan")], [1.0]], "text", None):
        with pytest.raises(ValueError, match="its spikes are no"):
            check_run_state({**state, "spikes": damaged})
