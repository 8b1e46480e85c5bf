"""Choices in a folder of the user's own are words like longmix's."""

import pytest


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own" / "mixer").mkdir(parents=True)
    (tmp_path / "own" / "experiment").mkdir()
    target = "_target_: longmix.mixers.sliding_window.SlidingWindow"
    (tmp_path / "own" / "mixer" / "mine.yaml").write_text(f"# Made here.\n{target}\nwindow: 7 # how far\n")
    (tmp_path / "own" / "experiment" / "short.yaml").write_text("# @package _global_\nmax_steps: 3\n")


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["mixer=mine"], "window", 7),
        (["mixer=mine", "mixer.window=9"], "window", 9),
        (["mixer=mine*2+flash", "mixer.mine.window=9"], "pattern", ["mine", "mine", "flash"]),
    ],
)
@pytest.mark.parametrize("option", [["--config-dir", "own"], ["--config-dir=own"], ["-cd", "own"]])
def test_are_found(own, run_words, option, words, key, value):
    outcome = run_words("train", *option, *words, "experiment=short")
    assert outcome.err == ""
    (config,) = outcome.configs
    assert config["mixer"][key] == value and config["max_steps"] == 3


def test_have_help(own, run_words):
    outcome = run_words("train", "--config-dir", "own", "-h", "mixer=mine")
    assert outcome.code == 0 and "Made here." in outcome.out and "how far" in outcome.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-dir", "own", "mixer=mien"], "Did you mean mine?"),
        (["--config-dir", "own", "mixer=mine", "mixer.windw=3"], "Did you mean mixer.window?"),
        (["--config-dir", "nowhere", "mixer=mine"], "--config-dir: there is no folder nowhere."),
    ],
)
def test_are_checked(own, run_words, words, message):
    outcome = run_words("train", *words)
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and message in outcome.err
