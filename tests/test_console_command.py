"""The console command: its overview, its words, what it refuses, and how messages name it."""

import pickle
import sys

import pytest

from longmix import __main__ as console
from longmix.command_line.catalogue import CATALOGUE
from longmix.command_line.program import as_called, program
from longmix.errors import ConfigError

CONSOLE, SCRIPT, MODULE, LIBRARY = "/venv/bin/longmix", "train.py", "/lib/longmix/__main__.py", "/usr/bin/notebook"


@pytest.fixture
def called(monkeypatch, capsys):
    """`called("trian")` is the exit code and what was printed."""
    monkeypatch.setattr("longmix.startup.begin", lambda resumable=False: None)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [CONSOLE, *arguments])
        code = console.main()
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",), ("help",)])
def test_overview_has_a_line_for_each_command(called, arguments):
    code, out, _ = called(*arguments)
    assert code == 0
    for command in CATALOGUE.values():
        assert len([line for line in out.splitlines() if line.split()[:1] == [command.name]]) == 1


def test_overview_imports_nothing_heavy(run_process):
    done = run_process("longmix", "--help", python=("-X", "importtime"))
    assert done.code == 0
    assert not {"hydra", "omegaconf", "torch", "numpy", "rich"} & {
        line.split("|")[-1].strip() for line in done.err.splitlines()
    }
    assert done.cpu_seconds < 0.3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("trian",), "longmix has no command trian. Did you mean longmix train?"),
        (("seq_len=5",), "longmix has no command seq_len=5. Commands are: train, evaluate,"),
        (("report",), "no value was given for: folders. `longmix report -h` lists the words."),
        (("export", "runs/a"), "no value was given for: folder."),
        (("export", "folder=out"), "no value was given for: checkpoint."),
        (("export", "a", "b", "c"), "c is a word too many."),
        (("export", "a", "b", "dtpye=bf16"), "unknown word dtpye. Did you mean dtype?"),
        (("export", "a", "b", "force=yes"), "force=yes is not one of true, false."),
        (("consolidate", "checkpoint=nowhere"), "nowhere"),
    ],
)
def test_refusals(called, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = called(*arguments)
    assert code == 2 and out == ""
    assert said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "words", "arguments"),
    [
        ("export", ["a", "b"], ["a", "b"]),
        ("export", ["folder=b", "checkpoint=a"], ["a", "b"]),
        ("export", ["folder=b", "a"], ["a", "b"]),
        ("export", ["a", "b", "as=llama", "force=true"], ["a", "b", "--as", "llama", "--force"]),
        ("export", ["a", "b", "force=false"], ["a", "b"]),
        ("export", ["a", "b", "--as", "llama"], ["a", "b", "--as", "llama"]),
        ("import", ["a", "b", "missing_bytes=drop"], ["a", "b", "--missing-bytes", "drop"]),
        ("report", ["a", "b", "output=c"], ["a", "b", "--output", "c"]),
        ("report", ["a", "output=null"], ["a"]),
        ("report", ["folders=[a,b]"], ["a", "b"]),
        ("report", ["multirun/0,mixer=flash"], ["multirun/0,mixer=flash"]),
        ("report", ["lr=1"], ["lr=1"]),
        ("consolidate", ["a"], ["a"]),
        ("consolidate", ["output=b", "checkpoint=a"], ["a", "b"]),
        ("consolidate", ["a", "output=null"], ["a"]),
        ("import", ["a", "b", "separator=null", "missing_bytes=null"], ["a", "b"]),
    ],
)
def test_words_become_the_arguments_of_a_tool(command, words, arguments):
    assert CATALOGUE[command].options(words) == arguments


@pytest.mark.parametrize("command", [command for command in CATALOGUE.values() if command.words])
def test_help_lists_every_word(called, command):
    code, out, _ = called(command.name, "-h")
    assert code == 0
    assert all(f"  {word.name}={word.default} " in out for word in command.words)


@pytest.mark.parametrize(
    ("argv", "train", "line"),
    [
        (CONSOLE, "longmix train", "longmix train -h; longmix plan; longmix report"),
        (MODULE, "longmix train", "longmix train -h; longmix plan; longmix report"),
        (SCRIPT, "python train.py", "python train.py -h; python -m longmix.planning; python -m longmix.reporting"),
        (LIBRARY, "longmix train", "python train.py -h; python -m longmix.planning; python -m longmix.reporting"),
    ],
)
def test_messages_name_what_was_called(monkeypatch, argv, train, line):
    monkeypatch.setattr(sys, "argv", [argv])
    assert program("train") == train
    assert as_called("python train.py -h; python -m longmix.planning; python -m longmix.reporting") == line


def test_an_audit_is_an_evaluation_of_causality(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", [CONSOLE, "audit"])
    monkeypatch.setattr("longmix.entry_points.run", lambda command: seen.append((command, sys.argv[1:])))
    assert console.run(CATALOGUE["audit"], ["checkpoint=runs/a"]) == 0
    assert seen == [("evaluate", ["checkpoint=runs/a", "task=causality"])]


def test_an_unknown_command_is_a_configuration_error():
    with pytest.raises(ConfigError, match="Did you mean longmix evaluate"):
        console._command("evalute")


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "prepare"])
def test_tasks_are_importable_so_that_a_launcher_hands_them_on_by_name(command):
    from longmix.entry_points import TASKS

    assert pickle.loads(pickle.dumps(TASKS[command])) is TASKS[command]
