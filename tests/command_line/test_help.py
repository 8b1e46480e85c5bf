"""`-h WORD`: what a word means, or that there is none."""

import pytest

from longmix.planning.__main__ import main as plan


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        pytest.param("train", ["seed"], ["  seed=0  ", "of weights, data order"], id="word"),
        pytest.param("train", ["seed=3"], ["  seed=0  "], id="word with a value"),
        pytest.param("train", ["loop"], ["loop.log_every=10", "loop.max_skips=20"], id="words below a name"),
        pytest.param("train", ["mixer"], ["mixer=flash", "sliding_window"], id="group"),
        pytest.param("train", ["mixer=rwkv7"], ["mixer=rwkv7 (mixer.SETTING=VALUE)", "2503.14456"], id="choice"),
        pytest.param("train", ["data=needle"], ["data=needle (data.SETTING=VALUE)", "answer_share: 0.5"], id="data"),
        pytest.param("train", ["mixer=flash*2+gla"], ["mixer=flash (", "mixer=gla ("], id="pattern"),
        pytest.param("train", ["mixer.window"], ["mixer=routing (mixer.window=VALUE)", "window: 512 #"], id="setting"),
        pytest.param(
            "train", ["mixer.routing.window"], ["mixer=routing (mixer.routing.window=VALUE)"], id="setting of a member"
        ),
        pytest.param(
            "train", ["data.needles"], ["data=needle (", "# How many a row hides", "needles: 1"], id="comments above"
        ),
        pytest.param("train", ["model.block"], ["block=standard (model.block=VALUE)"], id="setting of another group"),
        pytest.param("train", ["hydra.run.dir"], ["hydra.run.dir="], id="word of Hydra"),
        pytest.param("train", ["hydra.sweep"], ["hydra.sweep\n", "subdir:"], id="words of Hydra"),
        pytest.param("train", ["hydra/launcher=basic"], ["Hydra's own"], id="choice of Hydra"),
        pytest.param("train", ["seed", "mixer=gla"], ["  seed=0", "mixer=gla ("], id="several"),
        pytest.param("evaluate", ["task.needle.depths"], ["task=needle (task.needle.depths=VALUE)"], id="task"),
        pytest.param("evaluate", ["task=[loss,needle]"], ["task=loss (", "task=needle ("], id="list"),
        pytest.param("generate", ["top_k"], ["  top_k=null"], id="generate"),
        pytest.param("prepare", ["workers"], ["  workers=0"], id="prepare"),
    ],
)
def test_says_what_a_word_means(run_words, command, words, expected):
    outcome = run_words(command, "-h", *words)
    assert outcome.code == 0 and outcome.err == ""
    assert [text for text in expected if text not in outcome.out] == []
    assert len(outcome.out.splitlines()) < 130


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("train", ["foo"], "unknown word foo. Words are: mixer, model"),
        ("train", ["foo=bar"], "unknown word foo."),
        ("train", ["sed"], "unknown word sed. Did you mean seed?"),
        ("train", ["seed", "foo"], "unknown word foo."),
        ("train", ["mixer=flahs"], "mixer=flahs does not exist. Did you mean flash?"),
        ("train", ["mixer.windw"], "unknown word mixer.windw. Did you mean mixer.window?"),
        ("train", ["optimizer.lr"], "Did you mean optimizer.learning_rate?"),
        ("train", ["hydra.x"], "unknown word hydra.x. Settings of hydra are: run, sweep"),
        ("train", ["hydra/nope"], "there is no group hydra/nope."),
        ("train", ["rwkv7"], "rwkv7 is no word but a choice; write -h block=rwkv7 or -h mixer=rwkv7"),
        ("train", ["task=loss"], "task is not a word of python train.py."),
        ("train", [""], "an empty text is no name of a word."),
        ("train", ["="], "an empty text is no name of a word."),
        ("train", ["a\nb"], "a\\nb is no name of a word."),
        ("train", ["--foo", "seed"], "there is no option --foo."),
        ("evaluate", ["mixer=flash"], "cannot be chosen here: mixer comes from the checkpoint."),
        ("generate", ["temprature"], "Did you mean temperature?"),
        ("prepare", ["wokers"], "Did you mean workers?"),
    ],
)
def test_says_that_there_is_no_such_word(run_words, command, words, message):
    outcome = run_words(command, "-h", *words)
    assert outcome.code == 2 and outcome.out == "" and outcome.configs == []
    assert outcome.err.startswith("ConfigError: ") and len(outcome.err.splitlines()) == 1 and message in outcome.err


def test_options_with_values_ask_for_nothing(run_words):
    assert run_words("train", "-h", "--config-name", "train").out == run_words("train", "-h").out


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["-h"], 0, "  gpus=null "),
        (["-h", "gpus=4"], 0, "  gpus=null "),
        (["--help", "mixer=gla"], 0, "mixer=gla (mixer.SETTING=VALUE)"),
        (["-h", "foo"], 2, "unknown word foo."),
    ],
)
def test_of_the_planner(capsys, words, code, text):
    assert plan(words) == code
    printed = capsys.readouterr()
    assert text in (printed.err if code else printed.out)
