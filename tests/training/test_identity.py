"""One folder, one run, for real: processes at once, processes that are killed, and settings that change on the way."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faulty
import pytest
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from launched import together, torchrun_places

from longmix.checkpoints import CheckpointStore, load_checkpoint
from longmix.config import TrainConfig, plain, read
from longmix.errors import ConfigError
from longmix.mixers.parts.rotary import RotaryScalingOptions
from longmix.training.claims import LOCK_FILE, is_claimed
from longmix.training.identity import FIXED, FREE, changes
from longmix.training.run import train

ROOT = Path(__file__).parents[2]
BY_CLOCK = "name='${now:%Y}_run'"
"""A name of the clock that two commands have alike, unless they fall on New Year's Eve."""

SECONDS = 100


@pytest.fixture(scope="module")
def words(tiny_overrides) -> list[str]:
    return [*tiny_overrides, "mixer=flash", "seq_len=32", "trainer.num_threads=1", "loop.validate_every=null"]


def own(*words: str) -> dict[str, str]:
    return {"OWN_WORDS": " ".join(words)}


def killed_at(fault: str) -> dict[str, str]:
    """What makes a fault of `faulty.FAULTS` meet a process that trains alone."""
    return torchrun_places(1)[0] | {"FAULT": f"{fault}:0"}


def texts(ends: list) -> str:
    return "\n".join(end.text for end in ends)


@pytest.mark.parametrize("mixer", ["flash", "sliding_window", "hyper", "retention", "sliding_window+flash"])
def test_settings_that_a_run_of_an_earlier_version_lacks_have_their_defaults(mixer, compose_config):
    config = read(TrainConfig, compose_config(f"mixer={mixer}"))
    saved = plain(config)
    nodes = [saved["mixer"][name] for name in saved["mixer"]["pattern"]] if "+" in mixer else [saved["mixer"]]
    for node in nodes:
        for name in RotaryScalingOptions.__annotations__:
            del node[name]
    assert changes(saved, config) == {}


class TestAtOnce:
    def test_one_name_is_one_process(self, words, tmp_path):
        ends = together([*words, "name=same", "max_steps=20"], tmp_path, [own("seed=1"), own("seed=2")])
        assert sorted(end.code for end in ends) == [0, ConfigError.exit_code], texts(ends)
        refused, winner = sorted(ends, key=lambda end: -end.code)
        assert "runs/same is being trained right now by process" in refused.text or "already holds" in refused.text
        seed = 1 + ends.index(winner)
        assert yaml.safe_load((tmp_path / "runs/same/config.yaml").read_text())["seed"] == seed
        assert load_checkpoint(tmp_path / "runs/same/checkpoints/step-00000020")["config"]["seed"] == seed
        steps = [row["step"] for row in csv.DictReader((tmp_path / "runs/same/metrics.csv").open())]
        assert steps == ["10", "20", "20"]

    def test_one_second_is_two_runs(self, words, tmp_path):
        ends = together([*words, BY_CLOCK], tmp_path, [own("seed=1"), own("seed=2")])
        assert [end.code for end in ends] == [0, 0], texts(ends)
        folders = sorted((tmp_path / "runs").iterdir())
        assert [folder.name[4:] for folder in folders] == ["_run", "_run_2"]
        seeds = [yaml.safe_load((folder / "config.yaml").read_text())["seed"] for folder in folders]
        saved = [load_checkpoint(folder / "checkpoints/step-00000002")["config"]["seed"] for folder in folders]
        assert seeds == saved
        assert sorted(seeds) == [1, 2]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["name=run", BY_CLOCK], ids=["named", "by-clock"])
    def test_a_job_that_was_submitted_twice_continues_once(self, words, tmp_path, name):
        words = [*words, name, "max_steps=12", "loop.checkpoint_every=4", "loop.keep_checkpoints=9"]
        (killed,) = together(words, tmp_path, [killed_at("kill")])
        assert killed.code == -signal.SIGKILL
        (folder,) = (tmp_path / "runs").iterdir()
        assert [path.name for path in CheckpointStore(folder / "checkpoints").all()] == ["step-00000004"]
        assert (folder / LOCK_FILE).exists()
        assert not is_claimed(folder)
        ends = together([*words, "resume=auto"], tmp_path, [{}, {}])
        codes = sorted(end.code for end in ends)
        if codes == [0, 0]:  # the second began when the first had ended, and found nothing left to do
            assert sorted("steps    12 to 12" in end.text for end in ends) == [False, True], texts(ends)
        else:
            assert codes == [0, ConfigError.exit_code], texts(ends)
            assert "being trained right now by process" in texts(ends)
        assert list((tmp_path / "runs").iterdir()) == [folder]
        assert CheckpointStore(folder / "checkpoints").latest().name == "step-00000012"


class TestKilled:
    @pytest.mark.slow
    def test_while_the_configuration_is_written_it_is_the_old_one(self, words, tmp_path):
        words = [*words, "max_steps=12", "loop.checkpoint_every=4"]
        (killed,) = together([*words, BY_CLOCK], tmp_path, [killed_at("kill")])
        (folder,) = (tmp_path / "runs").iterdir()
        before = (folder / "config.yaml").read_bytes()
        (again,) = together(
            [*words, f"resume={folder}", "loop.gradient_clip=0.5"], tmp_path, [killed_at("kill-in-the-configuration")]
        )
        assert (killed.code, again.code) == (-signal.SIGKILL, -signal.SIGKILL)
        assert (folder / "config.yaml").read_bytes() == before
        (end,) = together([*words, BY_CLOCK, "resume=auto"], tmp_path, [{}])
        assert end.code == 0, end.text
        assert "steps    4 to 12" in end.text
        assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]
        assert not [path.name for path in folder.iterdir() if "tmp" in path.name or path.name == LOCK_FILE]

    @pytest.mark.slow
    def test_the_first_of_several_processes_holds_the_folder_and_frees_it(self, words, tmp_path):
        """The launcher hands the lock to it: killed, the folder is free; until then nobody else has it."""
        words = [*words, "name=run", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "max_steps=100000"]
        command = [sys.executable, faulty.__file__, *words]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        with (tmp_path / "said").open("w") as said:
            launcher = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said)
        try:
            metrics = tmp_path / "runs/run/metrics.csv"
            deadline = time.monotonic() + SECONDS
            while not metrics.exists() and launcher.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            assert metrics.exists(), (tmp_path / "said").read_text()
            assert is_claimed(tmp_path / "runs/run")
            (first,) = holders(tmp_path / "runs/run" / LOCK_FILE)
            assert first != launcher.pid
            assert f"process {first} on " in (tmp_path / "runs/run" / LOCK_FILE).read_text()
            os.kill(first, signal.SIGKILL)
            assert launcher.wait(SECONDS) == 4, (tmp_path / "said").read_text()
            assert not is_claimed(tmp_path / "runs/run")
        finally:
            launcher.kill()
            launcher.wait()


def holders(path: Path) -> list[int]:
    """The processes that have a file open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.samefile(path):
                found.add(int(link.parts[2]))
        except OSError:
            continue
    return sorted(found)


@pytest.fixture(scope="module")
def trained(composed, words, tmp_path_factory):
    """`trained(optimizer, "max_steps=6", ..., folder=...)` trains, and gives learning rates and the last state."""

    def run(*more: str, folder: Path) -> tuple[list[float], dict]:
        settings = [*words, "loop.log_every=1", "loop.checkpoint_every=3", "loop.keep_checkpoints=9", "max_steps=6"]
        try:
            train(composed([*settings, *more], "train", folder))
        finally:
            HydraConfig.instance().cfg = None
        rates = [row["train/learning_rate"] for row in csv.DictReader((folder / "metrics.csv").open())]
        latest = CheckpointStore(folder / "checkpoints").latest()
        return [float(rate) for rate in rates if rate], load_checkpoint(latest)

    return run


@pytest.fixture(scope="module", params=["muon", "adamw"])
def base(request, trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    rates, state = trained(f"optimizer={request.param}", "name=base", folder=folder)
    return f"optimizer={request.param}", folder, rates, state


class TestOptimizer:
    """What is set now counts, and not what was when the checkpoint was written."""

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize(
        ("word", "key", "index"),
        [
            ("learning_rate=0.0001", "peak_learning_rate", 0),
            ("adamw_learning_rate=0.0002", "peak_learning_rate", -1),
            ("weight_decay=0.3", "weight_decay", 0),
            ("betas=[0.8,0.7]", "betas", -1),
            ("eps=1e-3", "eps", -1),
            ("momentum=0.5", "momentum", 0),
        ],
    )
    def test_a_changed_setting_takes_effect(self, base, trained, tmp_path, word, key, index):
        optimizer, folder, rates, state = base
        if optimizer == "optimizer=adamw" and ("adamw" in word or "momentum" in word):
            pytest.skip("AdamW has no such setting")
        resume = f"resume={folder}/checkpoints/step-00000003"
        changed, now = trained(optimizer, "name=new", resume, f"optimizer.{word}", folder=tmp_path / "new")
        value = yaml.safe_load(word.partition("=")[2].replace("1e-3", "0.001"))
        groups = [group for one in now["optimizers"] for group in one["param_groups"]]
        if key == "weight_decay":
            assert {group[key] for group in groups} == {0.0, value}
        else:
            found = groups[index][key]
            assert found == (tuple(value) if isinstance(value, list) else value)
        assert not all(torch.equal(now["model"][name], weight) for name, weight in state["model"].items())
        if word.startswith("learning_rate"):
            peak = state["optimizers"][0]["param_groups"][0]["peak_learning_rate"]
            assert changed == pytest.approx([rate * 0.0001 / peak for rate in rates[3:]])

    def test_an_unchanged_one_changes_nothing(self, base, trained, tmp_path):
        optimizer, folder, rates, state = base
        resume = f"resume={folder}/checkpoints/step-00000003"
        same, now = trained(optimizer, "name=new", resume, folder=tmp_path / "new")
        assert same == rates[3:]
        assert all(torch.equal(now["model"][name], weight) for name, weight in state["model"].items())


class TestTables:
    """docs/runs.md lists what the code lists."""

    @pytest.mark.parametrize("table", [FREE, FIXED], ids=["free", "fixed"])
    def test_every_setting_is_in_the_docs_with_its_reason(self, table):
        text = (ROOT / "docs" / "runs.md").read_text()
        for key, reason in table.items():
            assert f"| `{key}` | {reason} |" in text
