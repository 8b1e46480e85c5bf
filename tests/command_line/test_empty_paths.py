"""An unset variable of the shell leaves an empty word, which never means the working folder."""

import dataclasses

import pytest
from omegaconf import OmegaConf

import longmix
from longmix import __main__ as console
from longmix.command_line.catalogue import CATALOGUE
from longmix.command_line.schema import HYDRA_PATHS, SCHEMAS
from longmix.config import read, words_of
from longmix.config.rules import check_values, defaults
from longmix.errors import ConfigError, LongmixError
from longmix.evaluation.tasks.lm_eval import LMEval
from longmix.interop import rwkv

TYPED = [
    (command, name)
    for command, kind in SCHEMAS.items()
    for name, (entry, _) in words_of(kind).items()
    if entry.metadata.get("path")
]
LISTED = [(command, word) for command in CATALOGUE.values() for word in command.words]


@pytest.mark.parametrize(("command", "name"), TYPED)
@pytest.mark.parametrize("value", ["", " "])
def test_of_a_command_that_hydra_composes(command, name, value):
    kind = SCHEMAS[command]
    given = dict.fromkeys(words_of(kind), "x") | defaults(kind) | {name: value}
    for entry, (_, hint) in words_of(kind).items():
        if dataclasses.is_dataclass(hint):
            given[entry] = defaults(hint)
    with pytest.raises(ConfigError, match=rf"^{name} is empty; was a variable of the shell not set\? Give a path"):
        check_values(kind, given)


def test_every_path_of_a_command_is_marked_as_one():
    assert {name for _, name in TYPED} == {
        *("checkpoint", "draft", "input", "load", "output", "prompt_file", "resume", "save", "states"),
    }


@pytest.mark.parametrize(
    "line",
    [
        *(f"{name}=" for name in HYDRA_PATHS),
        *(f"{name}=''" for name in HYDRA_PATHS),
        "--config-dir=",
        "hydra.searchpath=['']",
    ],
)
@pytest.mark.parametrize("option", [[], ["-m"]])
def test_of_hydra(run_words, tmp_path, line, option):
    outcome = run_words("train", *option, line)
    assert (outcome.code, outcome.configs) == (2, [])
    name = line.partition("=")[0]
    assert outcome.err.startswith(f"ConfigError: {name} is empty; was a variable of the shell not set?")
    assert len(outcome.err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_of_a_word_on_the_command_line(run_words, tmp_path):
    outcome = run_words("generate", "checkpoint=x", "save=", task=lambda config: read(SCHEMAS["generate"], config))
    assert outcome.code == 2 and outcome.err.startswith("ConfigError: save is empty;")
    outcome = run_words("train", "seed=1", "")
    assert outcome.err == "ConfigError: an argument is empty; was a variable of the shell not set?\n"


@pytest.mark.parametrize(("command", "word"), LISTED, ids=[f"{command.name}-{word.name}" for command, word in LISTED])
def test_of_a_command_with_words_of_its_own(monkeypatch, capsys, tmp_path, command, word):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("longmix.startup.begin", lambda resumable=False: None)
    monkeypatch.setattr("sys.argv", ["longmix"])
    assert console.main([command.name, f"{word.name}="]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"ConfigError: {word.name}")
    said = "is empty; was a variable of the shell not set?" if word.path or not word.choices else "is not one of"
    assert said in message or (word.switch and "is not one of true, false" in message) or word.name in ("gpu", "gpus")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: longmix.train(["max_steps=1"], folder=""), "folder is empty;"),
        (lambda: longmix.load(""), "the name of a checkpoint is empty;"),
        (lambda: longmix.load("x", states=""), "states is empty;"),
        (lambda: longmix.train(["max_steps=1"], folder=3), "folder=3 is no path; give a text or a Path"),
        (lambda: longmix.load("x", states=3), "states=3 is no path;"),
        (lambda: longmix.load(None), "checkpoint=None is no path;"),
        (lambda: longmix.load("x", trust=3), "trust=3 must be a text or a list of texts"),
        (lambda: longmix.load("x", mixer=3), "mixer=3 is no mapping of settings"),
        (lambda: LMEval("x", include_path=""), r"task\.include_path is empty;"),
        (lambda: console.main([""]), None),
    ],
)
def test_from_python(monkeypatch, tmp_path, call, said, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("longmix.startup.begin", lambda resumable=False: None)
    if said is None:
        assert call() == 2 and "the name of the command is empty" in capsys.readouterr().err
    else:
        with pytest.raises(LongmixError, match=said):
            call()
    assert list(tmp_path.iterdir()) == []


def test_of_an_option(capsys):
    assert rwkv.main(["x", ""]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith("ConfigError: argument output: it is empty;")


def test_a_path_with_interpolation_is_read_first():
    config = OmegaConf.create({"checkpoint": "x", "save": "${prompt_file}", "prompt_file": ""})
    with pytest.raises(ConfigError, match=r"^save is empty|^prompt_file is empty"):
        read(SCHEMAS["generate"], OmegaConf.merge(OmegaConf.create(defaults(SCHEMAS["generate"])), config))
