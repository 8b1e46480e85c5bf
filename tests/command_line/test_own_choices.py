"""Choices in a folder of the user's own are words like longmix's."""

import pytest


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own" / "mixer").mkdir(parents=True)
    (tmp_path / "own" / "experiment").mkdir()
    target = "_target_: longmix.mixers.sliding_window.SlidingWindow"
    (tmp_path / "own" / "mixer" / "mine.yaml").write_text(f"# Made here.\n{target}\nwindow: 7 # how far\n")
    (tmp_path / "own" / "experiment" / "short.yaml").write_text("# @package _global_\nmax_steps: 3\n")
    (tmp_path / "blank, ü" / "mixer").mkdir(parents=True)
    (tmp_path / "blank, ü" / "mixer" / "theirs.yaml").write_text(f"{target}\nwindow: 5\n")
    whole = "defaults: [train, _self_]\nhydra: {searchpath: ['blank, ü']}\n"
    (tmp_path / "own" / "whole.yaml").write_text(whole)
    (tmp_path / "own" / "other.yaml").write_text("max_steps: 3\n")
    (tmp_path / "own" / "open.yaml").write_text("defaults: [train\n")
    for name, text in {"misspelt": "# @package _global_\nseq_le: 3\n", "placed": "seq_len: 3\n", "cut": "x: ["}.items():
        (tmp_path / "own" / "experiment" / f"{name}.yaml").write_text(text)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["mixer=mine"], "window", 7),
        (["mixer=mine", "mixer.window=9"], "window", 9),
        (["mixer=mine*2+flash", "mixer.mine.window=9"], "pattern", ["mine", "mine", "flash"]),
    ],
)
@pytest.mark.parametrize(
    "option", [["--config-dir", "own"], ["--config-dir=own"], ["-cd", "own"], ["hydra.searchpath=[own]"]]
)
def test_are_found(own, run_words, option, words, key, value):
    outcome = run_words("train", *option, *words, "experiment=short")
    assert outcome.err == ""
    (config,) = outcome.configs
    assert config["mixer"][key] == value and config["max_steps"] == 3


@pytest.mark.parametrize(
    "words",
    [
        ["hydra.searchpath=[own,'blank, ü']"],
        ["hydra.searchpath=[own]", "hydra.searchpath=['blank, ü',\"own\"]"],
        ["hydra.searchpath=[file://own,'blank, ü']"],
        ["--config-dir", "own", "hydra.searchpath=['blank, ü']"],
        ["--config-dir", "own", "--config-name", "whole"],
    ],
)
def test_of_several_places_stand_in_a_pattern(own, run_words, words):
    outcome = run_words(
        "train", *words, "mixer=mine*2+theirs+flash", "mixer.theirs.window=6", "mixer.flash.num_heads=2"
    )
    assert outcome.err == ""
    (config,) = outcome.configs
    assert config["mixer"]["pattern"] == ["mine", "mine", "theirs", "flash"]
    assert config["mixer"]["mine"]["window"] == 7 and config["mixer"]["theirs"]["window"] == 6


def test_of_a_package_are_found(own, run_words, tmp_path, monkeypatch):
    package = tmp_path / "package_of_mine"
    (package / "mixer").mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "own" / "mixer" / "mine.yaml").rename(package / "mixer" / "mine.yaml")
    monkeypatch.syspath_prepend(str(tmp_path))
    outcome = run_words("train", "hydra.searchpath=[pkg://package_of_mine]", "mixer=mine*2+flash")
    assert outcome.err == "" and outcome.configs[0]["mixer"]["pattern"] == ["mine", "mine", "flash"]


def test_have_help(own, run_words):
    outcome = run_words("train", "--config-dir", "own", "-h", "mixer=mine")
    assert outcome.code == 0 and "Made here." in outcome.out and "how far" in outcome.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-dir", "own", "mixer=mien"], "Did you mean mine?"),
        (["--config-dir", "own", "mixer=mine", "mixer.windw=3"], "Did you mean mixer.window?"),
        (["--config-dir", "nowhere", "mixer=mine"], "--config-dir: there is no folder nowhere."),
        (["hydra.searchpath=[nowhere]", "mixer=mine"], "hydra.searchpath: there is no folder nowhere."),
        (["hydra.searchpath=[pkg://no.where]"], "hydra.searchpath: there is no folder pkg://no.where."),
        (["hydra.searchpath=own", "mixer=mine"], "hydra.searchpath=own is not a list; write hydra.searchpath=[own]."),
        (["+hydra.searchpath=[own]", "mixer=mine"], "+hydra.searchpath stands with +; write hydra.searchpath="),
        (["hydra.searchpath=[own]", "mixer=mien*2+flash"], "Did you mean mine?"),
        (["hydra.searchpath=[own]", "mixer=mine*0+flash"], "the count '0' of mine"),
        (["-cd", "own", "-cn", "whle"], "--config-name whle: there is no whle.yaml in a folder of --config-dir"),
        (["-cd", "own", "-cn", "whle"], "Did you mean whole?"),
        (["-cd", "own", "-cn", "other"], "A file of your own for it has `defaults: [train, _self_]`."),
        (["-cd", "own", "-cn", "open"], "own/open.yaml is not valid YAML: line 2"),
        (["-cd", "own", "experiment=cut"], "own/experiment/cut.yaml is not valid YAML: line 1"),
        (["-cd", "own", "experiment=misspelt"], "experiment/misspelt.yaml: unknown word seq_le. Did you mean seq_len?"),
        (["-cd", "own", "experiment=placed"], "experiment/placed.yaml needs `# @package _global_` as its first line"),
    ],
)
def test_are_checked(own, run_words, words, message):
    outcome = run_words("train", *words)
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and message in outcome.err
