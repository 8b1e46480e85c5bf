"""Where a run starts, by `resume`, by its name and by what is in the folders beside it."""

import copy
import dataclasses
import logging
import os
import re
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from longmix.checkpoints import CheckpointStore, find_checkpoint
from longmix.config import OriginRecord, TrainConfig, read, resolved
from longmix.errors import CheckpointError, ConfigError, StorageError
from longmix.locks import try_lock
from longmix.training import claims
from longmix.training import resume as resuming
from longmix.training.claims import LOCK_FILE, try_claim
from longmix.training.resume import Start


@pytest.fixture(scope="module")
def composed_once(composed, tmp_path_factory) -> dict:
    try:
        return resolved(composed(["mixer=sliding_window", "name=run"], "train", tmp_path_factory.mktemp("run")))
    finally:
        HydraConfig.instance().cfg = None


@pytest.fixture
def config(composed_once) -> dict:
    return copy.deepcopy(composed_once)


SWEPT: list[tuple[str, ...] | None] = [None]
"""The words of the sweep that the runs of a test are of."""


def typed(config: dict) -> TrainConfig:
    """The configuration of a command, with the origin that it found."""
    return dataclasses.replace(read(TrainConfig, config), origin=OriginRecord.of(config.get("origin")))


def find_start(config: dict, folder: Path, **more) -> Start:
    return resuming.find_start(typed(config), folder, swept=SWEPT[0], **more)


@pytest.fixture
def sweep():
    """`sweep("seed")` makes the runs of a test those of a sweep."""
    yield lambda *words: SWEPT.__setitem__(0, words)
    SWEPT[0] = None


def saved_run(folder: Path, config: dict, *steps: int) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    store = CheckpointStore(folder / "checkpoints")
    return [store.save(run_state(config, step), {}) for step in steps]


def run_state(config: dict, step: int) -> dict:
    facts = {"data_fingerprint": {"key": "a"}, "run": {}, "steps_skipped": 0, "random": {}, "optimizers": []}
    return {"step": step, "config": config, **facts}


def begun(config: dict, folder: Path, **more) -> Start:
    """A start that is over again, as far as others are concerned."""
    with find_start(config, folder, **more) as start:
        start.begin(start.config_of(typed(config)))
    return start


def found(config: dict, folder: Path, **more) -> tuple[str, int]:
    """The name of the folder where a run would start, and its step."""
    with find_start(config, folder, **more) as start:
        return start.folder.name, start.step


def auto(config: dict, **more) -> dict:
    return {**config, "resume": "auto", **more}


class TestNamed:
    def test_a_fresh_run_starts_at_zero_in_its_own_folder(self, tmp_path, config):
        start = begun(config, tmp_path / "run")
        assert (start.folder, start.step, start.saved) == (tmp_path / "run", 0, None)

    def test_a_fresh_run_refuses_a_folder_with_checkpoints(self, tmp_path, config):
        saved_run(tmp_path / "run", config, 3)
        with pytest.raises(ConfigError, match="resume=auto, or choose another name"):
            find_start(config, tmp_path / "run")
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "config.yaml"]

    def test_a_command_that_its_launcher_runs_again_continues_in_its_folder(self, tmp_path, config, monkeypatch):
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        saved_run(tmp_path / "other", config, 5)
        assert found(config, tmp_path / "run") == ("run", 0)
        saved_run(tmp_path / "run", config, 3)
        assert found(config, tmp_path / "run") == ("run", 3)
        (tmp_path / "run" / "config.yaml").write_text("")
        assert found(config, tmp_path / "run") == ("run", 3)

    @pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
    @pytest.mark.parametrize(
        "earlier",
        [{"seed": 4}, {"resume": "runs/other"}, {"optimizer": {"learning_rate": 0.1}}, {"max_steps": 4}],
        ids=str,
    )
    def test_a_command_that_had_not_begun_does_not_take_an_older_run_for_its_own(
        self, tmp_path, config, monkeypatch, variable, earlier
    ):
        monkeypatch.setenv(variable, "1")
        saved_run(tmp_path / "run", merged(config, earlier), 3)
        before = (tmp_path / "run" / "config.yaml").read_bytes()
        with pytest.raises(ConfigError, match=r"run already holds a run \(step-00000003\)"):
            find_start(config, tmp_path / "run")
        assert (tmp_path / "run" / "config.yaml").read_bytes() == before

    def test_auto_looks_in_that_folder_only(self, tmp_path, config):
        saved_run(tmp_path / "a", config, 3)
        assert found(auto(config), tmp_path / "b") == ("b", 0)
        saved_run(tmp_path / "b", {**config, "loop": {**config["loop"], "gradient_clip": 0.5}}, 2)
        assert found(auto(config), tmp_path / "b") == ("b", 2)

    def test_resume_of_another_run_begins_a_branch_in_the_named_folder(self, tmp_path, config):
        saved_run(tmp_path / "a", config, 3)
        resume = {**config, "resume": str(tmp_path / "a")}
        assert found(resume, tmp_path / "b") == ("b", 3)
        saved_run(tmp_path / "b", config, 2)
        with pytest.raises(ConfigError, match=r"b already holds a run \(step-00000002\), and .* is not of it"):
            find_start(resume, tmp_path / "b")

    @pytest.mark.parametrize("resume", [None, "auto"])
    def test_a_folder_in_use_is_refused_by_who_uses_it(self, tmp_path, config, resume):
        with (
            find_start(config, tmp_path / "run"),
            pytest.raises(ConfigError, match=rf"run is being trained right now by process {os.getpid()} on "),
        ):
            find_start({**config, "resume": resume}, tmp_path / "run")
        assert found({**config, "resume": resume}, tmp_path / "run") == ("run", 0)

    def test_a_lock_that_nobody_signed_yet_is_waited_for(self, tmp_path, config, monkeypatch):
        folder = tmp_path / "run"
        folder.mkdir()
        looks = try_lock(folder / LOCK_FILE)
        monkeypatch.setattr(claims.time, "sleep", lambda _: looks.release(remove=True))
        assert found(config, folder) == ("run", 0)

        folder.mkdir(exist_ok=True)
        signs = try_lock(folder / LOCK_FILE)
        monkeypatch.setattr(claims.time, "sleep", lambda _: (folder / LOCK_FILE).write_text("process 7 on host"))
        with pytest.raises(ConfigError, match="run is being trained right now by process 7 on host"):
            find_start(config, folder)
        signs.release()

    def test_a_run_that_is_continued_by_its_path_is_held(self, tmp_path, config):
        saved_run(tmp_path / "a", config, 3)
        resume = {**config, "resume": str(tmp_path / "a")}
        with (
            find_start(resume, tmp_path / "new", named=False),
            pytest.raises(ConfigError, match="a is being trained right now"),
        ):
            find_start(resume, tmp_path / "newer", named=False)

    def test_a_launchers_next_attempt_waits_for_the_one_before(self, tmp_path, config, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        monkeypatch.setattr(claims, "PATIENCE_SECONDS", 0.2)
        before = try_claim(tmp_path / "run")
        with pytest.raises(ConfigError, match="being trained right now"):
            find_start(config, tmp_path / "run")
        monkeypatch.setattr(claims, "PATIENCE_SECONDS", 60)
        monkeypatch.setattr(claims.time, "sleep", lambda _: before.release())
        assert found(config, tmp_path / "run") == ("run", 0)

    @pytest.mark.parametrize("inner", ["runs/a/b", "runs/a/b/c"])
    def test_no_run_lies_in_another(self, tmp_path, config, inner):
        saved_run(tmp_path / "runs" / "a", config, 3)
        with pytest.raises(ConfigError, match=r"runs/a is a run, and .* would lie in it"):
            find_start(config, tmp_path / inner)

    def test_a_folder_of_runs_is_no_run(self, tmp_path, config):
        saved_run(tmp_path / "runs" / "study" / "first", config, 3)
        with pytest.raises(ConfigError, match="study holds other runs, as first"):
            find_start(config, tmp_path / "runs" / "study")


class TestUnnamed:
    def test_a_folder_that_the_clock_named_twice_gets_a_suffix(self, tmp_path, config):
        with find_start(config, tmp_path / "now", named=False) as first:
            with find_start(config, tmp_path / "now", named=False) as second:
                assert (first.folder.name, second.folder.name) == ("now", "now_2")
                assert (first.name, second.name) == ("run", "run_2")
                assert OmegaConf.load(tmp_path / "now_2" / "config.yaml").name == "run_2"
            first.begin(typed(config))
        assert found(config, tmp_path / "now", named=False) == ("now_2", 0)

    def test_auto_finds_the_newest_run_of_the_same_configuration(self, tmp_path, config):
        (old,) = saved_run(tmp_path / "old", config, 3)
        saved_run(tmp_path / "new", {**config, "name": "new"}, 5)
        saved_run(tmp_path / "other", {**config, "seed": 9}, 7)
        os.utime(old, (1, 1))
        with find_start(auto(config, name="third"), tmp_path / "third", named=False) as start:
            assert (start.folder, start.step, start.name) == (tmp_path / "new", 5, "new")

    def test_auto_without_an_earlier_run_starts_afresh(self, tmp_path, config):
        saved_run(tmp_path / "other", {**config, "max_tokens": 5}, 7)
        assert found(auto(config), tmp_path / "run", named=False) == ("run", 0)

    @pytest.mark.parametrize(
        "change",
        [
            {"loop": {"gradient_clip": 0.01}},
            {"loop": {"nonfinite": "skip"}},
            {"data": {"validation_tokens": 128}},
            {"data": {"task": {"pairs": 8}}},
            {"optimizer": {"betas": [0.8, 0.9]}},
            {"schedule": {"final": 0.5}},
            {"trainer": {"precision": "bf16-mixed"}},
            {"checkpoint": "runs/other"},
            {"mixer": {"window": 7}},
            {"max_steps": 4},
        ],
        ids=str,
    )
    def test_every_setting_that_can_change_the_result_makes_another_run(self, tmp_path, config, change):
        saved_run(tmp_path / "old", config, 3)
        assert found(auto(merged(config, change)), tmp_path / "run", named=False) == ("run", 0)

    @pytest.mark.parametrize(
        "change",
        [
            {"loop": {"log_every": 1, "validate_every": 7, "checkpoint_every": 9, "keep_checkpoints": 5}},
            {"loop": {"async_checkpoints": True, "sharded_checkpoints": True}},
            {"data": {"cache_dir": "elsewhere", "num_workers": 2}},
            {"trainer": {"devices": 2, "strategy": "ddp", "micro_batch_size": 1, "num_threads": 1, "timeout": 5}},
            {"model": {"activation_checkpointing": "block"}},
            {"logger": {"_target_": "longmix.training.loggers.NoLog"}},
            {"name": "other"},
        ],
        ids=str,
    )
    def test_what_cannot_change_the_result_does_not(self, tmp_path, config, change):
        saved_run(tmp_path / "old", config, 3)
        assert found(auto(merged(config, change)), tmp_path / "run", named=False) == ("old", 3)

    def test_limits_count_as_the_steps_they_allow(self, tmp_path, config):
        per_step = config["batch_size"] * config["seq_len"]
        saved_run(tmp_path / "old", {**config, "max_steps": 20, "max_tokens": 800_000}, 3)
        config = auto(config, max_steps=None, max_tokens=20 * per_step)
        assert found(config, tmp_path / "run", named=False) == ("old", 3)

    def test_a_setting_of_a_later_version_had_its_default(self, tmp_path, config):
        older = merged(config, {})
        del older["data"]["num_workers"], older["loop"]["nonfinite"], older["trainer"]["compile"]
        del older["model"]["logit_penalty"], older["tuning"]
        saved_run(tmp_path / "old", older, 3)
        assert found(auto(config), tmp_path / "run", named=False) == ("old", 3)

    def test_a_run_of_this_configuration_that_is_being_trained_is_named(self, tmp_path, config):
        with find_start(auto(config), tmp_path / "first", named=False):
            with pytest.raises(ConfigError, match=r"first is being trained right now by .* resume=auto would continue"):
                find_start(auto(config), tmp_path / "second", named=False)
            assert found(auto(config, seed=1), tmp_path / "second", named=False) == ("second", 0)

    @pytest.mark.parametrize(
        "content",
        [b"", b"seed: [", b"- 1", b"\xff\xfe", b"a: &a [1]\nb: [" + b"*a, " * 9 + b"]", b"x: " + b"y" * 2_000_000],
        ids=["empty", "no-yaml", "list", "no-text", "aliases", "large"],
    )
    def test_a_damaged_configuration_is_read_from_the_checkpoint(self, tmp_path, config, caplog, content):
        saved_run(tmp_path / "old", config, 3)
        (tmp_path / "old" / "config.yaml").write_bytes(content)
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "config.yaml").write_bytes(content)
        assert found(auto(config), tmp_path / "run", named=False) == ("old", 3)
        assert [record.getMessage() for record in caplog.records if "broken is passed over" in record.getMessage()]

    def test_the_newest_checkpoint_continues_in_place_and_an_older_one_in_a_new_folder(self, tmp_path, config):
        older, newest = saved_run(tmp_path / "old", config, 3, 6)
        for resume, place in ((newest, ("old", 6)), (tmp_path / "old", ("old", 6)), (older, ("new", 3))):
            assert found({**config, "resume": str(resume)}, tmp_path / "new", named=False) == place

    def test_a_path_may_be_relative(self, tmp_path, config, monkeypatch):
        saved_run(tmp_path / "old", config, 3, 6)
        monkeypatch.chdir(tmp_path)
        for resume in ("old", "old/checkpoints/step-00000006", "./old/../old"):
            start = begun({**config, "resume": resume}, tmp_path / "new", named=False)
            assert (start.folder.resolve(), start.step) == (tmp_path / "old", 6)


class TestSweep:
    def test_auto_finds_runs_of_other_sweeps(self, tmp_path, config, sweep):
        sweep("seed")
        saved_run(tmp_path / "monday" / "0,seed=0", config, 3)
        assert found(auto(config), tmp_path / "tuesday" / "0,seed=0", named=False) == ("0,seed=0", 3)

    def test_what_is_swept_counts(self, tmp_path, config, sweep):
        saved_run(tmp_path / "monday" / "0", config, 3)
        other = auto(merged(config, {"trainer": {"strategy": "ddp"}}))
        sweep("seed")
        assert found(other, tmp_path / "tuesday" / "1", named=False) == ("0", 3)
        sweep("trainer")
        assert found(other, tmp_path / "tuesday" / "1", named=False) == ("1", 0)

    def test_a_name_counts_where_it_was_given(self, tmp_path, config, sweep):
        sweep("seed")
        saved_run(tmp_path / "monday" / "0", {**config, "name": "a"}, 3)
        assert found(auto(config, name="b"), tmp_path / "tuesday" / "1", named=True) == ("1", 0)
        assert found(auto(config, name="a"), tmp_path / "tuesday" / "1", named=True) == ("0", 3)

    def test_a_folder_with_another_run_is_refused(self, tmp_path, config, sweep):
        sweep("seed")
        saved_run(tmp_path / "found" / "0", config, 3)
        other = auto(merged(config, {"loop": {"gradient_clip": 0.01}}))
        with pytest.raises(ConfigError, match=r"other settings: loop\.gradient_clip was 1\.0 and is 0\.01"):
            find_start(other, tmp_path / "found" / "0", named=False)

    def test_each_run_branches_off_into_a_folder_of_its_own(self, tmp_path, config, sweep):
        sweep("schedule")
        saved_run(tmp_path / "runs" / "a", config, 3)
        resume = {**config, "resume": str(tmp_path / "runs" / "a")}
        assert found(resume, tmp_path / "multirun" / "0", named=False) == ("0", 3)


class TestGoingBack:
    def test_later_checkpoints_are_moved_aside(self, tmp_path, config, caplog):
        caplog.set_level(logging.INFO)
        older, _ = saved_run(tmp_path / "run", config, 5, 10)
        (tmp_path / "run" / "evaluation").mkdir()
        for name in ("loss_validation_step5.json", "loss_validation_step10.json", "notes.txt"):
            (tmp_path / "run" / "evaluation" / name).touch()
        (tmp_path / "run" / "summary.json").touch()
        start = begun({**config, "resume": str(older)}, tmp_path / "run")
        assert (start.folder, start.step) == (tmp_path / "run", 5)
        store = CheckpointStore(tmp_path / "run" / "checkpoints")
        assert store.latest() == older
        (aside,) = store.folder.glob("set-aside-*")
        assert find_checkpoint(aside).name == "step-00000010"
        assert {path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.parent.name[:4] != "step"} == {
            "step-00000010",
            "summary.json",
            "evaluation",
            "evaluation/loss_validation_step10.json",
        }
        (line,) = [record.getMessage() for record in caplog.records if "set-aside" in record.getMessage()]
        assert line == f"The run goes back to step 5; what it had saved after that is in {aside}."

    @pytest.mark.parametrize("again", ["auto", "same"])
    @pytest.mark.parametrize("moment", range(6))
    def test_killed_at_any_moment_of_it_nothing_later_stays(self, tmp_path, config, monkeypatch, moment, again):
        """Before each rename in turn; the next command continues, or goes back once more."""
        older, _ = saved_run(tmp_path / "run", config, 5, 10)
        (tmp_path / "run/evaluation").mkdir()
        files = ["evaluation/loss_step-data_validation_step5_ab.json", "evaluation/loss_validation_step10_cd.json"]
        files += ["summary.json", "states.pt"]
        for name in files:
            (tmp_path / "run" / name).write_text('{"steps": 10}')
        words = {**config, "resume": str(older)}
        with monkeypatch.context() as patched:
            renamed = []
            original = Path.rename

            def rename(self, target):
                if len(renamed) >= moment:
                    raise KeyboardInterrupt
                renamed.append(target)
                return original(self, target)

            patched.setattr(Path, "rename", rename)
            try:
                begun(words, tmp_path / "run")
            except KeyboardInterrupt:
                pass
            else:
                assert moment > 3
        moved = moment > 0
        start = begun(auto(config) if again == "auto" else words, tmp_path / "run")
        left = sorted(path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*.*"))
        left = [name for name in left if not name.startswith("checkpoints")]
        if again == "auto" and not moved:
            assert (start.step, len(left)) == (10, 5)
            return
        assert start.step == 5
        assert left == ["config.yaml", files[0]]
        asides = [path for path in (tmp_path / "run/checkpoints").glob("set-aside-*") if any(path.iterdir())]
        assert len(asides) == 1
        assert all((asides[0] / name).exists() for name in files[1:])

    def test_results_of_a_run_whose_checkpoints_were_deleted_are_set_aside(self, tmp_path, config):
        saved_run(tmp_path / "run", config)
        (tmp_path / "run/evaluation").mkdir()
        (tmp_path / "run/evaluation/loss_validation_step10_cd.json").touch()
        (tmp_path / "run/summary.json").write_text('{"steps": 10}')
        begun(config, tmp_path / "run")
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
            "checkpoints",
            "config.yaml",
            "evaluation",
        ]
        assert list((tmp_path / "run/evaluation").iterdir()) == []

    def test_a_finished_run_keeps_its_results(self, tmp_path, config):
        config = {**config, "max_steps": 5}
        saved_run(tmp_path / "run", config, 5)
        (tmp_path / "run/evaluation").mkdir()
        (tmp_path / "run/evaluation/loss_step2000-data_validation_step5_cd.json").touch()
        (tmp_path / "run/summary.json").write_text('{"steps": 5}')
        (tmp_path / "run/states.pt").touch()
        before = sorted((tmp_path / "run").rglob("*"))
        begun(auto(config), tmp_path / "run")
        assert sorted((tmp_path / "run").rglob("*")) == before

    def test_nothing_is_moved_before_all_is_known_to_fit(self, tmp_path, config):
        older, newest = saved_run(tmp_path / "run", config, 5, 10)
        with find_start({**config, "resume": str(older)}, tmp_path / "run") as start, pytest.raises(CheckpointError):
            start.check_data({"key": "b"})
        assert CheckpointStore(tmp_path / "run" / "checkpoints").latest() == newest

    def test_a_launchers_next_attempt_does_not_go_back_again(self, tmp_path, config, monkeypatch):
        older, _ = saved_run(tmp_path / "run", config, 5, 10)
        config = {**config, "resume": str(older)}
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        begun(config, tmp_path / "run")
        CheckpointStore(tmp_path / "run" / "checkpoints").save(run_state(config, 7), {})
        assert found(config, tmp_path / "run") == ("run", 7)
        slower = {**config, "optimizer": {**config["optimizer"], "learning_rate": 1e-5}}  # requeued before it began
        assert found(slower, tmp_path / "run") == ("run", 5)
        monkeypatch.delenv("SLURM_RESTART_COUNT")
        assert found(config, tmp_path / "run") == ("run", 5)

    def test_what_was_set_aside_can_be_gone_back_to(self, tmp_path, config):
        older, _ = saved_run(tmp_path / "run", config, 5, 10)
        begun({**config, "resume": str(older)}, tmp_path / "run")
        (aside,) = (tmp_path / "run" / "checkpoints").glob("set-aside-*/step-00000010")
        assert found({**config, "resume": str(aside)}, tmp_path / "run") == ("run", 10)


class TestKilledBetweenTwoRenames:
    """The only checkpoint of the run was about to take the place of another of its step."""

    @pytest.fixture
    def killed(self, tmp_path, config):
        (path,) = saved_run(tmp_path / "old", config, 3)
        path.rename(path.with_name(path.name + ".new"))
        return path

    @pytest.mark.parametrize("named", [True, False])
    @pytest.mark.parametrize("resume", ["auto", "old", "old/checkpoints", "old/checkpoints/step-00000003"])
    def test_it_is_continued(self, tmp_path, config, killed, monkeypatch, resume, named):
        monkeypatch.chdir(tmp_path)
        start = begun({**config, "resume": resume}, tmp_path / ("old" if named else "new"), named=named)
        assert (start.folder.resolve(), start.step) == (tmp_path / "old", 3)
        assert CheckpointStore(tmp_path / "old/checkpoints").all() == [killed]

    def test_a_branch_begins_from_it(self, tmp_path, config, killed):
        assert found({**config, "resume": str(tmp_path / "old")}, tmp_path / "new") == ("new", 3)


class TestWhatMayChange:
    @pytest.mark.parametrize(
        ("key", "value", "words"),
        [
            ("seed", 4, "seed was 0 and is 4"),
            ("batch_size", 64, "batch_size was 2 and is 64"),
            ("mixer", {"_target_": "longmix.mixers.flash.Flash"}, "mixer.window was 256 and is absent"),
        ],
    )
    def test_another_run_is_refused_by_the_settings_that_differ(self, tmp_path, config, key, value, words):
        saved_run(tmp_path / "old", config, 3)
        with pytest.raises(CheckpointError, match=words):
            find_start({**config, key: value, "resume": str(tmp_path / "old")}, tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_a_longer_budget_is_no_other_run(self, tmp_path, config):
        saved_run(tmp_path / "old", config, 3)
        resume = {**config, "max_steps": 99, "resume": str(tmp_path / "old")}
        assert found(resume, tmp_path / "new", named=False) == ("old", 3)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"loop": {"gradient_clip": 0.01}}, "loop.gradient_clip was 1.0 and is 0.01"),
            ({"optimizer": {"learning_rate": 0.1}}, "optimizer.learning_rate was 0.01 and is 0.1"),
            ({"max_steps": 2}, "steps was 3 and is 2"),
        ],
        ids=str,
    )
    def test_a_finished_run_does_not_answer_for_other_settings(self, tmp_path, config, change, words):
        config = {**config, "max_steps": 3}
        saved_run(tmp_path / "run", config, 3)
        before = (tmp_path / "run" / "config.yaml").read_bytes()
        with pytest.raises(CheckpointError, match=f"nothing is left to train with other settings: {re.escape(words)}"):
            find_start(auto(merged(config, change)), tmp_path / "run")
        begun(auto(merged(config, {"loop": {"log_every": 3}})), tmp_path / "run")
        assert (tmp_path / "run" / "config.yaml").read_bytes() == before

    def test_what_takes_effect_is_said_and_written(self, tmp_path, config, caplog):
        caplog.set_level(logging.INFO)
        saved_run(tmp_path / "run", {**config, "max_steps": 10}, 5)
        change = {"optimizer": {"learning_rate": 0.001}, "max_steps": 10, "schedule": {"warmup": 0}}
        begun(auto(merged(config, change)), tmp_path / "run")
        said = [record.getMessage() for record in caplog.records if record.name.endswith("identity")]
        assert said == [
            "optimizer.learning_rate was 0.01 and is 0.001 from step 6.",
            "schedule.warmup was 0.05 and is 0 from step 6.",
            "The learning rate of step 6 is 0.0004719; with the earlier settings it was 0.005085.",
        ]
        assert OmegaConf.load(tmp_path / "run" / "config.yaml").optimizer.learning_rate == 0.001

    def test_more_steps_change_the_rate(self, tmp_path, config, caplog):
        caplog.set_level(logging.INFO)
        saved_run(tmp_path / "run", {**config, "max_steps": 10}, 10)
        begun(auto({**config, "max_steps": 20}), tmp_path / "run")
        said = [record.getMessage() for record in caplog.records if record.name.endswith("identity")]
        assert said[0] == "steps was 10 and is 20 from step 11."
        assert re.fullmatch(
            r"The learning rate of step 11 is 0.00\d+; with the earlier settings it was 0.001.", said[1]
        )

    def test_a_schedule_from_a_file_is_not_built(self, tmp_path, config, caplog):
        """Reading a run's configuration calls nothing that it names."""
        caplog.set_level(logging.INFO)
        evil = {"_target_": "os.mkdir", "path": str(tmp_path / "made")}
        saved_run(tmp_path / "run", {**config, "schedule": evil}, 5)
        begun(auto(config), tmp_path / "run")
        assert not (tmp_path / "made").exists()
        assert "schedule._target_ was os.mkdir" in caplog.text

    def test_a_run_keeps_the_checkpoint_that_it_began_from(self, tmp_path, config):
        saved_run(tmp_path / "run", {**config, "checkpoint": "runs/a"}, 5)
        assert begun(auto(config), tmp_path / "run").config_of(typed(config)).checkpoint == "runs/a"
        assert OmegaConf.load(tmp_path / "run" / "config.yaml").checkpoint == "runs/a"
        with pytest.raises(CheckpointError, match="began from runs/a, not from runs/b"):
            find_start(auto({**config, "checkpoint": "runs/b"}), tmp_path / "run")
        with pytest.raises(CheckpointError, match="not from fresh weights; give checkpoint=runs/a,"):
            find_start(auto({**config, "model": {**config["model"], "d_model": 8}}), tmp_path / "run")

    def test_other_data_are_refused_by_what_differs(self, tmp_path, config):
        saved_run(tmp_path / "old", config, 3)
        with find_start({**config, "resume": str(tmp_path / "old")}, tmp_path / "new") as start:
            start.check_data({"key": "a"})
            with pytest.raises(CheckpointError, match="key was a and is b"):
                start.check_data({"key": "b"})
        assert not (tmp_path / "new").exists()


class TestRefused:
    def test_a_lock_that_links_to_nowhere_is_one_error(self, tmp_path, config):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/.lock").symlink_to(tmp_path / "nowhere/lock")
        with pytest.raises(StorageError, match="No such file"):
            find_start(auto(config), tmp_path / "run")

    @pytest.mark.parametrize("named", [True, False])
    def test_leaves_no_folder(self, tmp_path, config, named):
        with find_start(config, tmp_path / "run", named=named) as start:
            assert (start.folder / "config.yaml").exists()
        assert list(tmp_path.iterdir()) == []

    def test_leaves_what_was_there(self, tmp_path, config):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").touch()
        with find_start(config, tmp_path / "run"):
            pass
        assert (tmp_path / "run" / "notes.txt").exists()

    def test_a_begun_run_keeps_its_configuration(self, tmp_path, config):
        begun(config, tmp_path / "run")
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def merged(config: dict, change: dict) -> dict:
    return OmegaConf.to_container(OmegaConf.merge(config, change))
