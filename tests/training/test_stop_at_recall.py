"""`loop.stop_at_recall`: a run ends after a validation that recalls enough, and resumes to the same end."""

import os
import signal

import pytest
from hydra.core.hydra_config import HydraConfig

from longmix.checkpoints import CheckpointStore, load_checkpoint
from longmix.checkpoints.verify import read_info
from longmix.errors import ConfigError, Interrupted
from longmix.metrics import read_metrics
from longmix.training import run as run_module
from longmix.training.ending import Ending
from longmix.training.module import TrainingModule

WORDS = ["data=parity", "seq_len=8", "batch_size=4", "max_tokens=null", "max_steps=6", "data.validation_tokens=400"]
WORDS += ["loop.log_every=1", "loop.validate_every=2", "loop.checkpoint_every=100", "trainer.num_threads=1"]
WORDS += ["model.d_model=16", "model.num_layers=1", "model.mlp_hidden=16", "logger=csv", "trainer=cpu"]


@pytest.fixture
def train(composed, tmp_path):
    """`train(*words)` in one folder, and its summary."""

    def run(*words: str, folder=tmp_path / "runs" / "parity") -> dict:
        try:
            return dict(run_module.train(composed([*WORDS, *words], "train", folder)))
        finally:
            HydraConfig.instance().cfg = None

    return run


@pytest.fixture
def steps(monkeypatch):
    """The steps that training takes from here on."""
    taken, original = [], TrainingModule.training_step

    def counted(self, batch, index):
        original(self, batch, index)
        taken.append(self.step)

    monkeypatch.setattr(TrainingModule, "training_step", counted)
    return taken


@pytest.mark.slow
def test_a_run_ends_with_the_validation_that_recalls_enough_and_resumes_to_the_same_end(train, steps, tmp_path):
    folder = tmp_path / "runs" / "parity"
    stop = "loop.stop_at_recall=0.3"  # of parities, guesses meet half
    summary = train(stop, "loop.tasks=[accuracy]", "loop.tasks_every=50")
    assert steps == [1, 2] and summary["steps"] == summary["validation"]["step"] == 2
    assert summary["tokens"] == 2 * 4 * 8 and summary["validation"]["recall"] >= 0.3
    newest = CheckpointStore(folder / "checkpoints").latest()
    assert load_checkpoint(newest)["step"] == 2 and read_info(newest)["validation"]["step"] == 2
    assert max(row["step"] for row in read_metrics(folder)) == 2
    assert any(key.startswith("task/accuracy/") for row in read_metrics(folder) for key in row)

    assert train(stop, "resume=auto", "loop.tasks=[accuracy]", "loop.tasks_every=50") == summary
    assert steps == [1, 2]  # nothing was left to do

    further = train("loop.stop_at_recall=1.0", f"resume={folder}")  # asks for more, and gets all steps
    assert steps == [1, 2, 3, 4, 5, 6] and further["steps"] == 6


@pytest.mark.slow
def test_a_run_that_a_signal_ended_before_the_validation_ends_with_it_when_it_is_resumed(train, steps, monkeypatch):
    accumulate = TrainingModule._accumulate

    def signalled(self, batch):
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(self, batch)

    monkeypatch.setattr(TrainingModule, "_accumulate", signalled)
    with pytest.raises(Interrupted):
        train("loop.stop_at_recall=0.3")
    monkeypatch.setattr(TrainingModule, "_accumulate", accumulate)
    summary = train("loop.stop_at_recall=0.3", "resume=auto")
    assert steps == [1, 2] and summary["steps"] == summary["validation"]["step"] == 2


@pytest.mark.slow
def test_a_recall_that_never_comes_changes_nothing(train, tmp_path):
    plain = train(folder=tmp_path / "runs" / "plain")
    never = train("loop.stop_at_recall=1.0", folder=tmp_path / "runs" / "never")
    assert plain["steps"] == never["steps"] == 6 and plain["validation"] == never["validation"]


def test_the_end_needs_the_validation_of_its_own_step():
    ending = Ending(6, 0.5)
    assert ending.is_at(2, {"step": 2, "recall": 0.5}) and ending.is_early(2, {"step": 2, "recall": 0.9})
    assert not Ending(6, 0.5).is_at(0, {"step": 0, "recall": 0.9})  # what a conversion took may recall before any step
    assert not ending.is_at(4, {"step": 2, "recall": 0.9}) and not ending.is_at(2, {"step": 2, "recall": 0.49})
    assert ending.is_at(6, {}) and not ending.is_early(6, {})
    assert not ending.is_at(2, {"step": 2, "loss": 0.1}) and not Ending(6, None).is_at(2, {"step": 2, "recall": 1.0})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=sotu"], r"loop\.stop_at_recall=0\.3: .* has no recall, as only synthetic tasks do"),
        (["loop.validate_every=null"], r"loop\.stop_at_recall=0\.3 has no effect without loop\.validate_every"),
        (["stages=[{max_steps:2},{max_steps:4}]", "max_steps=null"], r"a run with stages takes all their steps"),
        (["loop.stop_at_recall=1.5"], r"loop\.stop_at_recall=1\.5 must be above 0 and at most 1"),
    ],
)
def test_words_that_do_not_go_with_it(train, words, message):
    with pytest.raises(ConfigError, match=message):
        train("loop.stop_at_recall=0.3", *words)
