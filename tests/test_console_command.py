"""The console command: its overview, its words, what it refuses, and how messages name it."""

import argparse
import importlib
import json
import pickle
import sys

import pytest

from longmix import __main__ as console
from longmix.command_line.catalogue import CATALOGUE
from longmix.command_line.program import as_called, in_dialect, program
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
        (
            ("audit", "checkpoint=a", "task=loss"),
            "longmix audit has task=causality; longmix evaluate takes other tasks.",
        ),
        (("plan", "mixer=flash,kda"), "mixer=flash,kda gives several values; mixer takes one."),
        (("plan", "seq_len=1,2"), "seq_len=1,2 gives several values. Give one."),
        (("plan", "-m", "seed=1"), "-m is an option, and only words are taken here."),
        (("export", "a", "b", "dtype=float64"), "dtype=float64 is not one of float32, bfloat16, float16."),
        (("import", "a", "b", "missing_bytes=x"), "missing_bytes=x is not one of refuse, replace."),
        (("report", "runs", "outptu=x"), "unknown word outptu. Did you mean output? Words are: folders, output, best."),
        (("export", "a", "b", "--as", "lama"), "argument --as: invalid choice: 'lama'"),
        (("export", "a", "b", "force=yes"), "force=yes is not one of true, false."),
        (("consolidate", "checkpoint=nowhere"), "nowhere"),
        (("export", "a", "b", "as=lama"), "gated_deltanet, longmix. Did you mean llama?"),
        (
            ("kernels", "engine=atention"),
            "engine=atention is not one of attention, linear, delta, scatter. Did you mean",
        ),
        (("kernels", "delat"), "engine=delat is not one of attention, linear, delta, scatter. Did you mean delta?"),
        (("kernels", "acrh=90"), "unknown word acrh. Did you mean arch?"),
        (("kernels", "arch=[90,70]"), "arch=70 is not one of 80, 86, 89, 90, 100, 120."),
        (("kernels", "gate=exp"), "gate goes with engine=linear. `longmix kernels -h`"),
        (("kernels", "attention", "dim=[x]"), "dim=x must be a whole number from 1 to 256."),
        (("kernels", "attention", "dim=[64,257]"), "dim=257 must be a whole number from 1 to 256."),
        (("kernels", "attention", "dim=[]"), "dim is empty; was a variable of the shell not set? Give a value."),
        (("kernels", "linear", "dims=64"), "dims=64 must be two whole numbers from 1 to 512, such as 64/128."),
        (("kernels", "scatter", "sizes=[64/x]"), "sizes=64/x must be two whole numbers from 0 to 256"),
        (("kernels", "scatter", "block=0.5"), "block=0.5 must be a whole number from 1"),
        (("average", "runs", "last=many"), "last=many must be a whole number from 1"),
        (("share", "runs", "names=[key]", "atoms=-1"), "atoms=-1 must be a whole number from 1"),
        (("kernels", "delta", "gate=exp"), "gate goes with engine=linear, and engine is delta."),
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
        ("import", ["a", "b", "missing_bytes=replace"], ["a", "b", "--missing-bytes", "replace"]),
        ("report", ["a", "b", "output=c"], ["a", "b", "--output", "c"]),
        ("report", ["a", "output=null"], ["a"]),
        ("report", ["folders=[a,b]"], ["a", "b"]),
        ("report", ["multirun/0,mixer=flash"], ["multirun/0,mixer=flash"]),
        ("report", ["lr=1"], ["lr=1"]),
        ("consolidate", ["a"], ["a"]),
        ("kernels", [], []),
        ("kernels", ["engine=null", "arch=90"], ["--arch", "90"]),
        ("kernels", ["arch=[80,90]", "engine=delta"], ["delta", "--arch", "80", "90"]),
        ("kernels", ["delta", "cost_only=true"], ["delta", "--cost-only"]),
        ("kernels", ["delta", "--arch", "90"], ["delta", "--arch", "90"]),
        ("consolidate", ["output=b", "checkpoint=a"], ["a", "b"]),
        ("consolidate", ["a", "output=null"], ["a"]),
        ("average", ["a", "last=5", "output=b"], ["a", "--last", "5", "--output", "b"]),
        ("import", ["a", "b", "separator=null", "missing_bytes=null"], ["a", "b"]),
        ("share", ["a", "names=[query,key]", "atoms=2"], ["a", "--names", "query", "key", "--atoms", "2"]),
        ("share", ["a", "undo=true", "output=b"], ["a", "--undo", "--output", "b"]),
    ],
)
def test_words_become_the_arguments_of_a_tool(command, words, arguments):
    assert CATALOGUE[command].options(words) == arguments


def test_a_needed_word_is_named_as_it_is_written():
    with pytest.raises(ConfigError, match=r"no value was given for: last. `longmix average -h` lists the words."):
        CATALOGUE["average"].options(["a", "output=b"])


@pytest.mark.parametrize("argv", [CONSOLE, SCRIPT])
def test_options_in_messages_are_the_words_of_the_console(monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", [argv])
    said = "or --force to replace it; use --as longmix, which; give one by --separator. --missing-bytes 1--2"
    words = "or force=true to replace it; use as=longmix, which; give one by separator. missing_bytes 1--2"
    assert in_dialect(said) == (words if argv == CONSOLE else said)


@pytest.mark.parametrize("engine", ["attention", "linear", "delta", "scatter"])
def test_words_of_the_kernels_are_the_options_of_their_report(engine):
    from longmix_kernels import report
    from longmix_kernels.accelerators import ARCHITECTURES
    from longmix_kernels.aot import DTYPES

    words = {word.name: word for word in CATALOGUE["kernels"].words}
    assert words["engine"].choices == report.ENGINES
    assert words["arch"].choices == tuple(map(str, ARCHITECTURES)) and words["dtype"].choices == tuple(DTYPES)
    parser = argparse.ArgumentParser(add_help=False)
    importlib.import_module(f"longmix_kernels.{engine}.report").add_options(parser)
    options = {option.dest: option for option in parser._actions}
    assert set(options) == {name for name, word in words.items() if engine in word.only}
    for name, option in options.items():
        word = words[name]
        assert word.many == (option.nargs == "+")
        assert set(option.choices or ()) <= set(word.choices)
        if word.default != "null":
            default = list(map(str, option.default)) if word.many else [option.default]
            assert word.values(word.default) == default


@pytest.mark.parametrize("words", [["json=there/costs.json"], ["scatter", "sizes=64/64", "json=costs.json"]])
def test_a_report_of_costs_is_written_where_it_can_be(called, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    arguments = ("kernels", "cost_only=true", *words)
    if "json=costs.json" in words:
        code, out, _ = called(*arguments)
        assert code == 0 and "Estimates" in out
        assert set(json.loads((tmp_path / "costs.json").read_text())) == {"scatter"}
    else:
        with pytest.raises(SystemExit) as end:
            called(*arguments)
        assert end.value.code == 2


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
