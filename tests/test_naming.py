"""Names of runs and sweeps, and the limits that the command line gives."""

import dataclasses
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from longmix.config import TrainConfig, read, resolved, step_limits, total_steps, with_limits
from longmix.errors import ConfigError
from longmix.invocation import Invocation
from longmix.naming import (
    RunPlace,
    SweepFolder,
    check_name,
    mixer_word,
    named_by_clock,
    run_folder,
    same_words,
    sweep_name,
)


class TestNames:
    @pytest.mark.parametrize("name", ["a", "my run", "study/first", "2026-11-28_10-00-00_flash", "ünï", "a=b,c", "-a"])
    def test_allowed(self, name):
        check_name(name)
        assert run_folder(name) == f"runs/{name}"

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("", "is empty"),
            ("../evil", "leads out of runs/"),
            ("a/../../evil", "leads out of runs/"),
            ("..", "leads out of runs/"),
            ("a${", "which begins an interpolation"),
            ("/tmp/evil", "leads out of runs/"),
            ("C:evil", "leads out of runs/"),
            (".", "begins with a dot"),
            (".hidden", "begins with a dot"),
            ("a//b", "empty part"),
            ("a/", "empty part"),
            (" a", "blanks at an end"),
            ("a\nb", "cannot be seen"),
            ("\x1b[31mred", "cannot be seen"),
            ("é" * 121, "longer than 240 bytes"),
        ],
    )
    def test_refused_with_a_cure(self, name, words):
        with pytest.raises(ConfigError, match=rf"{words}.* A name is one folder below runs/, or several"):
            check_name(name)
        assert run_folder(name) == "runs/.refused"

    def test_hydra_makes_no_folder_elsewhere(self, compose_config):
        config = compose_config("name=../evil")
        assert HydraConfig.get().run.dir == "runs/.refused"
        with pytest.raises(ConfigError, match="leads out of"):
            read(TrainConfig, config).check_together()


@pytest.mark.parametrize("word", ["seed=${seed}", "optimizer.learning_rate=${oc.env:NOPE}", "mixer=flash"])
def test_words_stay_as_they_were_given(compose_config, word):
    compose_config(word)
    assert Invocation.of_command().words == (word,)


class TestPlace:
    def place(self, config, **changes) -> RunPlace:
        own = dataclasses.replace(read(TrainConfig, config), **changes)
        return RunPlace.of(own, named_by_clock(config), Invocation.of_command())

    def test_a_name_of_the_clock_is_no_users(self, compose_config, monkeypatch):
        config = compose_config("mixer=flash", output=Path("/x"))
        folder = Path(HydraConfig.get().run.dir).absolute()
        assert self.place(config).named  # /x was asked for
        with_folder = compose_config("mixer=flash", output=folder)
        assert not self.place(with_folder, name=folder.name).named

    def test_a_users_name(self, compose_config):
        config = compose_config("name=a", output=Path("runs/a").absolute())
        assert self.place(config) == RunPlace(Path("runs/a").absolute(), "a", True)

    @pytest.mark.parametrize(
        ("mixer", "name"),
        [
            ({"_target_": "longmix.mixers.mlstm_tfla.MLSTMTFLA"}, "mlstm_tfla"),
            (
                {
                    "pattern": ["sliding_window", "flash"],
                    "flash": {"_target_": "x"},
                    "sliding_window": {"_target_": "y"},
                },
                "sliding_window+flash",
            ),
        ],
    )
    def test_a_run_from_a_checkpoint_is_named_after_its_model(self, compose_config, mixer, name):
        config = compose_config("mixer=flash", "checkpoint=runs/a", "seq_len=64")
        own = read(TrainConfig, {**resolved(config), "mixer": mixer})
        own = dataclasses.replace(own, model=own.model.having(num_layers=3, d_model=32))
        compose_config("mixer=flash", "checkpoint=runs/a", "seq_len=64", output=Path(f"runs/{own.name}").absolute())
        place = RunPlace.of(own, named_by_clock(config), Invocation.of_command())
        assert place.name == own.name.replace("_flash_tiny_", f"_{name}_3x32_")
        assert (place.folder, place.named) == (Path(f"runs/{place.name}").absolute(), False)


class TestSweeps:
    @pytest.mark.parametrize(
        ("words", "name"),
        [
            ("", "3"),
            ("mixer=flash", "3,mixer=flash"),
            ("data.corpus.path=/a/b c,seed=1", "3,data.corpus.path=-a-b-c,seed=1"),
            ("mixer=sliding_window*3+flash", "3,mixer=sliding_window-3+flash"),
            ("++mixer.rotary_factor=2,seed=1", "3,mixer.rotary_factor=2,seed=1"),  # of the mixer of a checkpoint
        ],
    )
    def test_a_run_is_named_by_what_was_swept(self, words, name):
        assert sweep_name(3, words) == name

    @pytest.mark.parametrize("middle", ["first", "other"])
    def test_a_long_word_keeps_what_tells_it_from_another(self, middle):
        long = [f"data.corpus.path=/{'very/' * 40}{which}/{'long/' * 40}books" for which in ("first", "other")]
        names = [sweep_name(0, f"mixer=flash,{word}") for word in long]
        assert names[0] != names[1]
        assert all(len(name) < 130 and name.startswith("0,mixer=flash,data.corpus.path=") for name in names)

    def test_words_that_all_runs_have(self):
        words = ["experiment=shootout", "mixer=flash,rwkv7", "+a=1", "seed=range(3)", "model.d_model=64", "lr=2"]
        assert same_words(words, ["lr"]) == ["experiment", "a", "model.d_model"]

    def test_of_two_equal_words_the_last_one_says_whether_it_was_swept(self):
        assert same_words(["seq_len=64", "seed=1,2", "seq_len=32,64", "seed=1"]) == ["seed"]

    def test_each_sweep_has_a_folder_of_its_own(self, compose_config, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        folders = []
        for _ in range(2):
            compose_config("seed=1", "mixer=flash")
            hydra = OmegaConf.create({"hydra": OmegaConf.to_container(HydraConfig.instance().cfg.hydra, resolve=False)})
            hydra.hydra.sweep.dir = "multirun/${now:%Y}"
            SweepFolder().on_multirun_start(hydra)
            folders.append(hydra.hydra.sweep.dir)
            assert "hydra.job.config.override_dirname.exclude_keys=['seed','mixer']" in hydra.hydra.overrides.hydra
            assert f"hydra.sweep.dir='{hydra.hydra.sweep.dir}'" in hydra.hydra.overrides.hydra
        assert folders[1] == f"{folders[0]}_2"
        assert all(Path(folder).is_dir() for folder in folders)


class TestLimits:
    @pytest.mark.sampled(3)
    @pytest.mark.parametrize(
        ("words", "steps"),
        [
            ([], 782),
            (["max_steps=4000"], 4000),
            (["max_steps=4"], 4),
            (["+max_steps=4000"], 4000),
            (["max_steps=null"], 782),
            (["max_tokens=2048"], 2),
            (["max_steps=5", "max_tokens=2048"], 2),
            (["max_steps=1", "max_tokens=2048"], 1),
            (["experiment=sotu_hour", "max_steps=9999"], 9999),
            (["experiment=mqar"], 1200),
            (["experiment=mqar", "max_tokens=8192"], 2),
        ],
        ids=lambda value: ",".join(value) or "defaults" if isinstance(value, list) else "",
    )
    def test_the_command_line_wins_over_files(self, compose_config, words, steps):
        config = read(TrainConfig, compose_config(*words))
        assert total_steps(with_limits(config, HydraConfig.get().overrides.task)) == steps

    def test_both(self, compose_config):
        words = ["max_steps=5", "max_tokens=2048"]
        config = read(TrainConfig, compose_config(*words))
        assert step_limits(with_limits(config, words)) == {"max_steps": 5, "max_tokens": 2}


@pytest.mark.parametrize(
    ("node", "word"),
    [
        ({"_target_": "longmix.mixers.mlstm_tfla.MLSTMTFLA"}, "mlstm_tfla"),
        ({"_target_": "longmix.mixers.flash.Flash", "window": 3}, "flash"),
        ({"_target_": "longmix.mixers.tensor.TensorAttention"}, "tensor"),
        ({"_target_": "somebody.SSD"}, "SSD"),
        ({"_target_": "somebody.mixers.SSD"}, "SSD"),
        ({"pattern": ["flash", "ssd"], "flash": {}, "ssd": {}}, "flash+ssd"),
        ({"pattern": ["ssd", "ssd", "flash", "ssd"], "flash": {}, "ssd": {}}, "ssd*2+flash+ssd"),
    ],
)
def test_a_mixer_is_one_word(node, word):
    assert mixer_word(node) == word
