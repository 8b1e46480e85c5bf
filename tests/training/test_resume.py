import os
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from longmix.checkpoints import CheckpointStore
from longmix.config import resolved
from longmix.errors import CheckpointError, ConfigError
from longmix.training.resume import find_start


@pytest.fixture
def config(compose_config) -> dict:
    return resolved(compose_config("mixer=sliding_window", "name=run"))


@pytest.fixture(autouse=True)
def single_run(monkeypatch):
    mode = type("Hydra", (), {"mode": "RUN"})
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: mode))


def saved_run(folder: Path, config: dict, *steps: int) -> list[Path]:
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    store = CheckpointStore(folder / "checkpoints")
    rest = {"config": config, "data_fingerprint": {"key": "a"}, "run": {}}
    return [store.save({"step": step, **rest}, {}) for step in steps]


def test_a_fresh_run_starts_at_zero_in_its_own_folder(tmp_path, config):
    start = find_start(config, tmp_path / "run")
    assert (start.folder, start.step, start.state) == (tmp_path / "run", 0, None)


def test_a_fresh_run_refuses_a_folder_with_checkpoints(tmp_path, config):
    saved_run(tmp_path / "run", config, 3)
    with pytest.raises(ConfigError, match="resume=auto, or choose another name"):
        find_start(config, tmp_path / "run")


def test_a_command_that_its_launcher_runs_again_continues_in_its_folder(tmp_path, config, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    saved_run(tmp_path / "other", config, 5)
    assert find_start(config, tmp_path / "run").step == 0
    saved_run(tmp_path / "run", config, 3)
    start = find_start(config, tmp_path / "run")
    assert (start.folder, start.step) == (tmp_path / "run", 3)


def test_auto_finds_the_newest_run_of_the_same_configuration(tmp_path, config):
    (old,) = saved_run(tmp_path / "old", config, 3)
    saved_run(tmp_path / "new", config, 5)
    saved_run(tmp_path / "other", {**config, "seed": 9}, 7)
    os.utime(old, (1, 1))
    start = find_start({**config, "resume": "auto", "name": "third"}, tmp_path / "third")
    assert (start.folder, start.step) == (tmp_path / "new", 5)


def test_auto_without_an_earlier_run_starts_afresh(tmp_path, config):
    saved_run(tmp_path / "other", {**config, "max_tokens": 5}, 7)
    start = find_start({**config, "resume": "auto"}, tmp_path / "run")
    assert (start.folder, start.step) == (tmp_path / "run", 0)


def test_the_newest_checkpoint_continues_in_place_and_an_older_one_in_a_new_folder(tmp_path, config):
    older, newest = saved_run(tmp_path / "old", config, 3, 6)
    assert find_start({**config, "resume": str(newest)}, tmp_path / "new").folder == tmp_path / "old"
    assert find_start({**config, "resume": str(tmp_path / "old")}, tmp_path / "new").step == 6
    start = find_start({**config, "resume": str(older)}, tmp_path / "new")
    assert (start.folder, start.step) == (tmp_path / "new", 3)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", 4, "seed was 0 and is 4"),
        ("batch_size", 64, "batch_size was 2 and is 64"),
        ("mixer", {"_target_": "longmix.mixers.flash.Flash"}, "mixer.window was 256 and is absent"),
    ],
)
def test_another_run_is_refused_by_the_settings_that_differ(tmp_path, config, key, value, words):
    saved_run(tmp_path / "old", config, 3)
    with pytest.raises(CheckpointError, match=words):
        find_start({**config, key: value, "resume": str(tmp_path / "old")}, tmp_path / "new")


def test_a_longer_budget_is_no_other_run(tmp_path, config):
    saved_run(tmp_path / "old", config, 3)
    assert find_start({**config, "max_steps": 99, "resume": str(tmp_path / "old")}, tmp_path / "new").step == 3


def test_other_data_are_refused_by_what_differs(tmp_path, config):
    saved_run(tmp_path / "old", config, 3)
    start = find_start({**config, "resume": str(tmp_path / "old")}, tmp_path / "new")
    start.check_data({"key": "a"})
    with pytest.raises(CheckpointError, match="key was a and is b"):
        start.check_data({"key": "b"})
