"""One command evaluates every run of a sweep, and one refused run does not keep the others from it."""

import json
import os
import shutil
from pathlib import Path

import pytest

from longmix.errors import CheckpointError, ConfigError, LongmixError
from longmix.evaluation.run import evaluate_all, runs_below


@pytest.fixture(scope="module")
def run_folder(run_training) -> Path:
    return run_training("data=parity", "seq_len=16")


@pytest.fixture
def sweep(run_folder, tmp_path) -> Path:
    """Two runs, and one that was killed before its first checkpoint."""
    for name in ("0,seed=0", "1,seed=1"):
        shutil.copytree(run_folder, tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "2,seed=2" / "checkpoints").mkdir(parents=True)
    return tmp_path / "sweep"


@pytest.fixture
def evaluated(compose_config):
    def run(folder: Path, *overrides: str) -> dict:
        words = f"checkpoint='{folder}'", "task=accuracy", "max_tokens=64", *overrides
        return evaluate_all(compose_config(*words, entry_point="evaluate"))

    return run


def test_all_runs_are_evaluated_into_their_own_folders(sweep, evaluated, capsys):
    reports = evaluated(sweep)
    assert list(reports) == [sweep / "0,seed=0", sweep / "1,seed=1"]
    for number, (run, report) in enumerate(reports.items(), start=1):
        (saved,) = (run / "evaluation").glob("accuracy_GroupWords_validation_step2_*.json")
        assert json.loads(saved.read_text())["lengths"]["16"] == report["accuracy"]["lengths"][16]
        assert f"{number} of 2: {run}" in capsys.readouterr().out or number == 2


def test_a_run_or_a_checkpoint_means_itself(sweep, evaluated):
    run = sweep / "0,seed=0"
    (checkpoint,) = (run / "checkpoints").iterdir()
    for folder in (run, run / "checkpoints", checkpoint):
        assert runs_below(folder) == [] and list(evaluated(folder)) == [folder]


def test_a_refused_run_leaves_the_others(sweep, evaluated, capsys):
    (state,) = (sweep / "0,seed=0").glob("checkpoints/*/*.pt")
    state.write_bytes(b"x")
    with pytest.raises(LongmixError, match=r"1 of 2 runs were not evaluated, or not by every task"):
        evaluated(sweep)
    assert "CheckpointError" in capsys.readouterr().err
    assert not (sweep / "0,seed=0" / "evaluation").exists() and (sweep / "1,seed=1" / "evaluation").is_dir()


@pytest.mark.parametrize("word", ["output", "states"])
def test_what_is_of_one_run_is_refused_for_several(sweep, evaluated, tmp_path, word):
    with pytest.raises(ConfigError, match=f"{word}=.*/one is of one run, and .* holds 2"):
        evaluated(sweep, f"{word}={tmp_path}/one")
    assert not list(sweep.rglob("evaluation"))


def test_a_folder_without_runs(tmp_path, evaluated, compose_config):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        evaluated(tmp_path)
    with pytest.raises(CheckpointError, match="there is no"):
        evaluated(tmp_path / "nothing")


@pytest.mark.parametrize("words", [[], ["checkpoint="]], ids=["absent", "an unset variable"])
def test_a_checkpoint_must_be_given(sweep, words, compose_config, monkeypatch):
    monkeypatch.chdir(sweep)
    with pytest.raises(ConfigError, match=r"no value was given for: checkpoint\. Give .*checkpoint=last is the newest"):
        evaluate_all(compose_config(*words, entry_point="evaluate"))
    assert not list(sweep.rglob("evaluation"))


def test_a_task_that_fails_in_one_run_leaves_tasks_and_runs(sweep, evaluated, capsys):
    with pytest.raises(LongmixError, match=r"2 of 2 runs were not evaluated, or not by every task"):
        evaluated(sweep, "task=[needle,accuracy]")  # a needle needs text
    assert capsys.readouterr().err.count("task=needle: ConfigError") == 2
    assert len(list(sweep.rglob("accuracy_*.json"))) == 2


def test_the_newest_run(sweep, evaluated, monkeypatch, capsys):
    (sweep.parent / "runs").symlink_to(sweep)
    monkeypatch.chdir(sweep.parent)
    newest = sweep / "1,seed=1" / "checkpoints" / "step-00000002" / "info.json"
    os.utime(newest, (2e9, 2e9))
    (folder,) = evaluated(Path("last"))
    assert (
        str(folder) == "runs/1,seed=1/checkpoints/step-00000002" and "last is runs/1,seed=1" in capsys.readouterr().err
    )
    assert (sweep / "1,seed=1" / "evaluation").is_dir() and not (sweep / "0,seed=0" / "evaluation").exists()
