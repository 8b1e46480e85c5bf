"""Sweeps: equal runs of a shootout, what a search is told, plugins that are not there, and both plugins at work."""

import importlib
import importlib.metadata
import json
import logging
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from longmix import cli, entry_points, startup
from longmix.command_line.help import help_text
from longmix.command_line.schema import Schema
from longmix.config import TrainConfig, read, resolved, total_steps
from longmix.errors import ConfigError
from longmix.model.matching import count_parameters, match_parameters

ROOT = Path(__file__).parents[1]

PACKAGES = {
    "search": "hydra-optuna-sweeper",
    "processes": "hydra-submitit-launcher",
    "slurm": "hydra-submitit-launcher",
}


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class TestShootout:
    @pytest.mark.parametrize(("mixer", "width"), [("flash", 352), ("rwkv7", 240)])
    def test_parameters(self, compose_config, mixer, width):
        config = read(TrainConfig, compose_config("experiment=shootout", f"mixer={mixer}"))
        matched = match_parameters(config, vocab_size=257)
        assert matched.model.number("mlp_hidden") == width
        assert abs(count_parameters(matched, 257) / 1_270_000 - 1) < 0.02

    def test_tokens_and_steps_at_every_length(self, compose_config):
        words = [f"seq_len={2**power}" for power in range(9, 14)]
        configs = [read(TrainConfig, compose_config("experiment=shootout", word)) for word in words]
        assert [config.batch_size for config in configs] == [16, 8, 4, 2, 1]
        assert {total_steps(config) for config in configs} == {98}

    def test_batch_size_can_still_be_given(self, compose_config):
        assert resolved(compose_config("experiment=shootout", "batch_size=3"))["batch_size"] == 3

    @pytest.mark.parametrize(("tokens", "seq_len", "count"), [(8192, 2048, 4), (8192, 3000, 2), (8192, 16384, 1)])
    def test_windows(self, tokens, seq_len, count):
        assert cli.windows(tokens, seq_len) == count


class TestObjective:
    def test_is_the_validation_loss(self, composed, tiny_overrides, tmp_path):
        objective = entry_points.train(composed([*tiny_overrides, "seq_len=32"], "train", tmp_path))
        assert objective == json.loads((tmp_path / "summary.json").read_text())["validation"]["loss"]


class TestPlugins:
    def choices(self):
        return [path.relative_to(ROOT / "configs") for path in sorted((ROOT / "configs" / "hydra").glob("*/*.yaml"))]

    def test_help_lists_them(self):
        text = " ".join(help_text(Schema("train", ROOT / "configs")).split())
        assert "hydra/launcher=basic where the runs of a sweep (-m) take place: processes, slurm" in text
        assert "hydra/sweeper=basic which values a sweep (-m) tries: search" in text
        assert {path.stem for path in self.choices()} == set(PACKAGES)

    def test_absent_package_is_named_with_its_extra(self, monkeypatch):
        def absent(package):
            raise importlib.metadata.PackageNotFoundError(package)

        monkeypatch.setattr(importlib.metadata, "version", absent)
        for path in self.choices():
            choice = f"{path.parent.as_posix()}={path.stem}"
            extra = {"sweeper": "sweep", "launcher": "slurm"}[path.parent.name]
            with pytest.raises(ConfigError) as caught:
                cli.check_plugins(["-m", choice])
            package = PACKAGES[path.stem]
            assert str(caught.value) == f"{choice} needs {package}; pip install 'longmix[{extra}]' brings it."
        cli.check_plugins(["-m", "seed=1,2", "hydra/sweeper=basic"])

    def test_refusal_is_one_line_and_an_exit_code(self, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["train.py", "-m", "hydra/sweeper=search"])
        monkeypatch.setattr(cli, "PLUGINS", {"no-such-package": ("sweep", {"hydra/sweeper=search"})})
        with pytest.raises(SystemExit) as caught:
            cli.run(lambda: None, "train")
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith("ConfigError: hydra/sweeper=search needs no-such-package; pip")

    def test_extras_bring_what_is_asked_for(self):
        import tomllib

        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for package, (extra, _) in cli.PLUGINS.items():
            assert any(requirement.startswith(package) for requirement in extras[extra])


class TestFolder:
    """A sweep's folder goes with the command unless a run has left something in it."""

    @pytest.fixture
    def sweep(self, monkeypatch, tmp_path, capsys):
        """Runs a command's sweep over two runs, in an empty folder; `task` gets each run's configuration."""

        def run(command: str, task, *words: str) -> int:
            (tmp_path / "own").mkdir(exist_ok=True)
            swept = {
                "train": "seed=1,2",
                "generate": "seed=1,2",
                "evaluate": "batch_size=1,2",
                "prepare": "workers=0,1",
            }
            monkeypatch.setattr(sys, "argv", [f"{command}.py", "-m", swept[command], *words])
            monkeypatch.setitem(entry_points.TASKS, command, cli.entry_point(task))
            handlers, level = logging.root.handlers[:], logging.root.level
            try:
                entry_points.run(command)
            except SystemExit as end:
                return int(end.code or 0)
            finally:
                logging.root.handlers[:], logging.root.level = handlers, level
            return 0

        monkeypatch.chdir(tmp_path)
        return run

    def refuse(self, config):
        raise ConfigError("no.")

    def write(self, config):
        (Path(HydraConfig.get().runtime.output_dir) / "result").touch()

    @pytest.mark.parametrize("command", ["evaluate", "generate", "prepare"])
    def test_of_runs_that_write_elsewhere(self, sweep, command, tmp_path):
        assert sweep(command, lambda config: None, *([] if command == "prepare" else ["checkpoint=x"])) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["own"]

    def test_of_runs_that_were_refused(self, sweep, tmp_path):
        assert sweep("train", self.refuse) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["own"]

    def test_of_runs_that_sigterm_ended(self, sweep, tmp_path, capsys):
        def terminate(config):
            os.kill(os.getpid(), signal.SIGTERM)

        before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            startup.end_in_order()
            assert sweep("evaluate", terminate, "checkpoint=x") == 143
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one kills
        finally:
            signal.signal(signal.SIGTERM, before)
        assert [path.name for path in tmp_path.iterdir()] == ["own"]
        assert capsys.readouterr().err.endswith("Terminated.\n")

    def test_with_results_stays(self, sweep, tmp_path):
        assert sweep("train", self.write) == 0
        (folder,) = (tmp_path / "multirun").iterdir()
        assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [
            "multirun.yaml",
            "result",
            "result",
        ]

    def test_that_was_there_before_stays(self, sweep, tmp_path):
        assert sweep("generate", lambda config: None, "checkpoint=x", "hydra.sweep.dir=own") == 0
        assert (tmp_path / "own").is_dir()


@pytest.mark.slow
class TestAtWork:
    @pytest.mark.skipif(not is_installed("hydra-optuna-sweeper"), reason="needs the extra `sweep`")
    def test_search_finds_the_least_loss(self, run_process, tiny_overrides, tmp_path):
        words = ["hydra/sweeper=search", "hydra.sweeper.n_trials=3", "hydra.sweep.dir=found", "seq_len=32"]
        space = "optimizer.learning_rate=tag(log,interval(1e-3,3e-2))"
        storage = ["hydra.sweeper.storage=sqlite:///search.db", "hydra.sweeper.study_name=rates"]
        done = run_process("train.py", "-m", *words, *storage, space, *tiny_overrides)
        assert done.code == 0, done.err
        best = yaml.safe_load((tmp_path / "found" / "optimization_results.yaml").read_text())
        losses = {}
        for path in (tmp_path / "found").glob("*/summary.json"):
            rate = OmegaConf.load(path.parent / "config.yaml").optimizer.learning_rate
            losses[rate] = json.loads(path.read_text())["validation"]["loss"]
        assert len(losses) == 3 and all(1e-3 <= rate <= 3e-2 for rate in losses)
        assert best["best_value"] == min(losses.values())
        assert losses[best["best_params"]["optimizer.learning_rate"]] == best["best_value"]
        assert (tmp_path / "search.db").stat().st_size > 0

    @pytest.mark.skipif(not is_installed("hydra-submitit-launcher"), reason="needs the extra `slurm`")
    def test_processes_train_every_run(self, run_process, tiny_overrides, tmp_path):
        words = ["hydra/launcher=processes", "experiment=shootout", "match.parameters=24_000", "seed=1,2"]
        done = run_process("train.py", "-m", *words, *tiny_overrides, "seq_len=32", "hydra.sweep.dir=sweep")
        assert done.code == 0, done.err
        summaries = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/summary.json")]
        assert len({summary["validation"]["loss"] for summary in summaries}) == 2
        assert all(summary["match"]["mlp_hidden"] == 32 for summary in summaries)
        assert len(list((tmp_path / "sweep" / ".submitit").glob("*/*_result.pkl"))) == 2


def test_a_failed_run_is_handed_on_by_other_processes():
    """Launchers pickle what a run's process raised."""
    failed = pickle.loads(pickle.dumps(cli.RunFailed("ConfigError: wrong.", 2)))
    assert str(failed) == "ConfigError: wrong." and failed.exit_code == 2 and failed.elsewhere
