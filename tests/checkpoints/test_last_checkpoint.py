"""`checkpoint=last`: the run that wrote a checkpoint last, whatever it is called and whether or not it is finished."""

import os
import shutil

import pytest
import torch

from longmix.checkpoints import CheckpointStore, chosen_checkpoint, find_checkpoint, load_checkpoint
from longmix.config import TrainConfig, read
from longmix.errors import CheckpointError
from longmix.invocation import Invocation
from longmix.training.warm_start import begins_from


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with three runs; `0,mixer=flash` of the sweep saved last, and its newest step is 4."""
    monkeypatch.chdir(tmp_path)
    for order, (run, steps) in enumerate({"runs/b": [9], "runs/a": [2], "multirun/day/0,mixer=flash": [2, 4]}.items()):
        for step in steps:
            saved = CheckpointStore(tmp_path / run / "checkpoints").save({"step": step, "w": torch.zeros(1)}, {})
            os.utime(saved / "info.json", (1000 * order + step, 1000 * order + step))
    (tmp_path / "runs" / "c" / "checkpoints").mkdir(parents=True)  # killed before its first
    return tmp_path


def test_the_newest_by_time_and_says_which(place, capsys):
    assert str(chosen_checkpoint("last")) == "multirun/day/0,mixer=flash/checkpoints/step-00000004"
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("last is multirun/day/0,mixer=flash/checkpoints/step-00000004, of 19")


def test_not_the_run_that_is_about_to_begin(place):
    assert chosen_checkpoint("last", place / "multirun/day/0,mixer=flash").parts[:2] == ("runs", "a")


def test_other_words_mean_what_they_meant(place, capsys):
    assert chosen_checkpoint("runs/b").name == "step-00000009"
    CheckpointStore(place / "last" / "checkpoints").save({"step": 7}, {})
    assert chosen_checkpoint("./last").name == "step-00000007"
    assert capsys.readouterr().err == ""


def test_none_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"no last run: no folder below runs/ or multirun/ in .* holds a checkp"):
        chosen_checkpoint("last")


def test_a_control_character_of_a_name_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    CheckpointStore(tmp_path / "runs" / "a\x1b[31m" / "checkpoints").save({"step": 1}, {})
    chosen_checkpoint("last")
    assert "\x1b" not in capsys.readouterr().err


def test_training_begins_from_it_and_notes_which(run_training, compose_config, tmp_path, monkeypatch):
    run = run_training("data=parity", "seq_len=16")
    (tmp_path / "runs").mkdir()
    shutil.copytree(run, tmp_path / "runs" / "first")
    monkeypatch.chdir(tmp_path)
    words = ("checkpoint=last", "data=parity", "seq_len=16", "logger=csv", "trainer=cpu")
    config, origin = begins_from(read(TrainConfig, compose_config(*words)), Invocation.of_command())
    assert config.checkpoint == "runs/first/checkpoints/step-00000002"
    assert torch.equal(
        origin.weights["embedding.weight"],
        load_checkpoint(find_checkpoint(run))["model"]["embedding.weight"],
    )
