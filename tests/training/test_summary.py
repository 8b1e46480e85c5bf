"""`summary.json`: what reports compare."""

import json
import platform
import time
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig

from longmix.metrics import read_metrics
from longmix.training import run as run_module
from longmix.training import summary as summary_module


@pytest.fixture(scope="module")
def run(run_training, tiny_overrides):
    return run_training(*tiny_overrides, "mixer=retention*2+flash", "seq_len=32", "loop.log_every=1")


@pytest.fixture(scope="module")
def summary(run):
    return json.loads((run / "summary.json").read_text())


def test_mixer_is_the_word_of_the_command_line(summary):
    assert summary["mixer"] == "retention*2+flash"


def test_peak_memory_is_the_largest_that_was_logged(run, summary):
    logged = [row["memory/peak_gib"] for row in read_metrics(run) if "memory/peak_gib" in row]
    assert len(logged) == 2
    assert summary["peak_memory_bytes"] / 2**30 == pytest.approx(max(logged), rel=1e-6)
    assert summary["peak_memory_bytes"] > 50e6  # torch alone takes more


def test_machine_and_costs(summary):
    assert summary["device"] == "CPU"
    assert summary["training_flops_per_token"] > 6 * summary["parameters"]["non_embedding"] / 2
    assert summary["tokens"] == 2 * summary["tokens_per_step"] == 128


def test_a_synthetic_task_says_how_many_targets_it_met(run_training, capsys):
    folder = run_training("data=mqar", "data.task.pairs=2", "mixer=flash", "seq_len=32", "loop.log_every=1")
    written = capsys.readouterr().err
    summary = json.loads((folder / "summary.json").read_text())
    rows = read_metrics(folder)
    assert 0 <= summary["validation"]["recall"] <= 1
    assert [row["validation/recall"] for row in rows if "validation/recall" in row] == [summary["validation"]["recall"]]
    assert sum("train/recall" in row for row in rows) == 2
    assert not any("bits_per_byte" in key for row in rows for key in row)
    assert "bits/byte" not in written
    assert f"{summary['validation']['recall']:.4f} recall" in written


def test_a_summary_says_to_which_step_its_validation_belongs(summary):
    assert summary["validation"]["step"] == summary["steps"] == 2


@pytest.fixture
def finished(composed, tiny_overrides, tmp_path):
    """`finished("resume=auto", ...)` trains, or asks again, and returns the summary; the folder is `tmp_path/run`."""

    def ask(*words: str) -> dict:
        words = (*tiny_overrides, "mixer=retention", "experiment=state_tuning", "checkpoint=null", "seq_len=32", *words)
        try:
            return run_module.train(composed([*words], "train", tmp_path / "run"))
        finally:
            HydraConfig.instance().cfg = None

    return ask


class TestAskedAgain:
    """A finished run computes nothing, and leaves its files as they are."""

    @pytest.fixture(autouse=True)
    def later_versions(self, finished, monkeypatch, tmp_path):
        self.first = finished()
        self.before = contents(tmp_path / "run")
        monkeypatch.setattr(run_module, "versions", lambda: {"python": "9.9", "torch": "9.9"})

    def test_every_file_stays(self, finished, tmp_path, capsys):
        capsys.readouterr()
        again = finished("resume=auto")
        assert contents(tmp_path / "run") == self.before
        assert again == json.loads(json.dumps(self.first))
        assert again["versions"]["python"] == platform.python_version()
        assert f"{self.first['validation']['bits_per_byte']:.4f} bits/byte" in capsys.readouterr().err

    @pytest.mark.parametrize("damage", ["", "{", '{"steps": 2}', None])
    def test_a_summary_that_cannot_be_read_is_written(self, finished, tmp_path, damage):
        path = tmp_path / "run/summary.json"
        path.unlink() if damage is None else path.write_text(damage)
        assert finished("resume=auto") == json.loads(path.read_text()) | {"versions": {"python": "9.9", "torch": "9.9"}}
        assert json.loads(path.read_text())["validation"] == self.first["validation"]

    def test_what_computes_something_says_with_what(self, finished, tmp_path):
        again = finished("resume=auto", "max_steps=3")
        assert (again["steps"], again["versions"]["python"]) == (3, "9.9")
        assert json.loads((tmp_path / "run/summary.json").read_text())["versions"]["python"] == "9.9"


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of every file."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_log_has_no_blanks_at_the_end_of_its_lines_and_no_broken_paths(run_training, tiny_overrides, capsys):
    folder = run_training(*tiny_overrides, "mixer=flash", "seq_len=32")
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert any(line.endswith(str(folder / "checkpoints/step-00000002")) for line in lines)


@pytest.mark.parametrize("name", ["[red]", "[/b]"])
def test_brackets_in_names_and_paths_are_no_markup(name, capsys):
    summary_module._print({"logs": f"runs/{name}"})
    assert f"runs/{name}" in capsys.readouterr().err


def test_time_is_that_of_the_whole_command(run_training, tiny_overrides, capsys, monkeypatch):
    monkeypatch.setenv("LONGMIX_BEGAN", str(time.time() - 7200))
    run_training(*tiny_overrides, "mixer=flash", "seq_len=32", "hydra.mode=RUN")
    assert "; 2:00:" in capsys.readouterr().err
