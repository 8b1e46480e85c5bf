"""What cannot be written is refused before the work whose result goes there, and nothing is left behind."""

import importlib
import os
from pathlib import Path

import pytest

from longmix import __main__ as console
from longmix.config import GenerateConfig
from longmix.config.rules import defaults
from longmix.errors import ConfigError, StorageError
from longmix.evaluation.run import evaluate
from longmix.files import check_folder, check_replaceable
from longmix.generation.run import generate
from longmix.interop import rwkv

WORK = [
    ("report {} output={}", "longmix.reporting.__main__.find_runs"),
    ("plan mixer=flash output={}", "longmix.planning.arguments.read_stages"),
    ("export {} {}", "longmix.interop.huggingface.export.chosen_checkpoint"),
    ("import {} {}", "longmix.interop.huggingface.load.check_seal"),
    ("consolidate {} {}", "longmix.checkpoints.__main__.load_checkpoint"),
    ("kernels json={}", "longmix_kernels.attention.report.builds"),
]
"""Command lines, and the beginning of their work."""


def fail(*_, **__):
    raise AssertionError("work has begun")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The working folder, in which `file` is a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    (tmp_path / "there").mkdir()
    return tmp_path


@pytest.mark.parametrize("target", ["file/x", "/proc/x"])
@pytest.mark.parametrize(("line", "work"), WORK, ids=[line.split()[0] for line, _ in WORK])
def test_a_command_refuses_it_at_its_start(monkeypatch, capsys, place, line, work, target):
    monkeypatch.setattr("longmix.startup.begin", lambda resumable=False: None)
    monkeypatch.setattr("sys.argv", ["longmix"])
    monkeypatch.setattr("longmix.checkpoints.__main__.chosen_checkpoint", Path)
    monkeypatch.setattr("longmix.checkpoints.__main__.read_info", lambda folder: {"format": "sharded"})
    module, _, name = work.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, fail)
    given = line.format("there", target) if line.count("{}") > 1 else line.format(target)
    try:
        code = console.main(given.split())
    except SystemExit as end:
        code = end.code
    (message,) = capsys.readouterr().err.splitlines()
    assert code == 2 and Path(target).parent.name in message and ("could not write" in message or "json" in message)
    assert sorted(os.listdir(place)) == ["file", "there"]  # noqa: PTH208


@pytest.mark.parametrize("target", ["file/x", "file", "/proc/x"])
def test_an_evaluation_refuses_it_at_its_start(monkeypatch, place, target):
    class Restored:
        checkpoint = place / "there"

    monkeypatch.setattr("longmix.evaluation.run._built", lambda tasks: {})
    monkeypatch.setattr("longmix.evaluation.run._data", fail)
    words = {"checkpoint": "there", "task": {"loss": {"_target_": "x"}}, "output": target}
    given = defaults(importlib.import_module("longmix.config").EvaluateConfig) | words
    with pytest.raises(StorageError, match="could not write"):
        evaluate(given, Restored())


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("file/x", StorageError, "could not write"),
        ("there", ConfigError, "save=there is the name of a folder"),
        ("nowhere/x", StorageError, "could not write"),
        ("/proc/x", StorageError, "could not write"),
    ],
)
def test_a_generation_refuses_it_at_its_start(monkeypatch, place, target, error, message):
    monkeypatch.setattr("longmix.generation.run.restored_for", fail)
    with pytest.raises(error, match=message):
        generate(defaults(GenerateConfig) | {"checkpoint": "there", "save": target})


@pytest.mark.parametrize("target", ["file/x.pth", "there", "/proc/x"])
def test_an_export_to_rwkv_refuses_it_at_its_start(monkeypatch, capsys, place, target):
    monkeypatch.setattr(rwkv, "chosen_checkpoint", fail)
    assert rwkv.main(["there", target]) == 2
    assert "could not write" in capsys.readouterr().err


class TestChecks:
    @pytest.mark.parametrize("name", ["there", "there/new/deep", "new"])
    def test_a_folder_that_can_be_made_is_not_made(self, place, name):
        check_folder(Path(name))
        assert sorted(path.name for path in place.rglob("*")) == ["file", "there"]

    def test_a_file_that_is_there_stays(self, place):
        check_replaceable(place / "file")
        check_replaceable(place / "new")
        assert (place / "file").read_text() == "kept" and sorted(os.listdir(place)) == ["file", "there"]  # noqa: PTH208

    @pytest.mark.parametrize("name", ["file", "file/x", "dangling/x", "x" * 300])
    def test_a_folder_that_cannot_be_made(self, place, name):
        (place / "dangling").symlink_to(place / "nowhere")
        if len(name) > 255:
            with pytest.raises(StorageError, match="File name too long"):
                check_replaceable(place / name)
        else:
            with pytest.raises(StorageError, match="is not a folder"):
                check_folder(place / name)
