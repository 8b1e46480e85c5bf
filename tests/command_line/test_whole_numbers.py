"""Every word that takes a whole number refuses what is none, or too large, in one line that names it.

`FUZZ_CASES=1000 pytest tests/command_line/test_whole_numbers.py` tries every value with every word.
"""

import os
import random
import re

import pytest

from longmix.command_line.schema import SCHEMAS, Schema, configs_folder
from longmix.config import TrainConfig, read, resolved

VALUES = ["1e30", "-1", "0", str(2**63), "-1e30", "nan", "inf", "true", "", "1.5", "0x10", "1_0_", "[1]", "null", "7"]
EVERY = int(os.environ.get("FUZZ_CASES", "30")) >= 1000
OTHERS = {
    "train": ["trainer=cpu", "logger=none", "name=x"],
    "evaluate": ["checkpoint=nowhere"],
    "generate": ["checkpoint=nowhere"],
    "prepare": ["data=text", "data.corpus.path=nowhere"],
}
"""What leads each command as far as its own checks."""


def task_of(command):
    from longmix.data.prepare_run import prepare_splits
    from longmix.evaluation.run import evaluate
    from longmix.generation.run import generate
    from longmix.training.run import check_config

    return {
        "train": lambda config: check_config(read(TrainConfig, resolved(config))),
        "evaluate": evaluate,
        "generate": generate,
        "prepare": prepare_splits,
    }[command]


def words_of(command: str) -> list[str]:
    return [name for name, takes in Schema(command, configs_folder()).words.items() if takes.whole]


def test_the_words_are_known():
    assert {command: len(words_of(command)) for command in SCHEMAS} == {
        "train": 20,
        "evaluate": 4,
        "generate": 6,
        "prepare": 2,
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", SCHEMAS)
def test_are_accepted_or_refused_by_name(run_words, command):
    task, found = task_of(command), []
    for word in words_of(command):
        for value in VALUES if EVERY else random.Random(word).sample(VALUES, 2):
            outcome = run_words(command, *OTHERS[command], f"{word}={value}", task=task)
            lines = outcome.err.splitlines()
            if outcome.code == 0 and not lines:
                continue
            if outcome.code == 2 and len(lines) == 1 and re.match(r"(Checkpoint|Data)Error: .*nowhere", lines[0]):
                continue  # the numbers were accepted, and the rest is as this test has it
            if outcome.code != 2 or len(lines) != 1 or not re.match(rf"ConfigError: .*\b{word}\b", lines[0]):
                found.append(f"{command} {word}={value}: {outcome.code} {outcome.err[:300]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("command", "argument", "message"),
    [
        ("train", "seed=1e30", "seed=1e30 is too large; whole numbers go up to 9223372036854775807."),
        ("train", "seed=9223372036854775808", "seed=9223372036854775808 is too large; whole numbers go up to"),
        ("train", "seed=-1e30", "seed=-1e30 is too small; whole numbers go down to -9223372036854775807."),
        ("train", "seed=4294967296", "seed=4294967296 must lie between 0 and 4294967295."),
        ("train", "seed=-1", "seed=-1 must lie between 0 and 4294967295."),
        ("train", "seed=nan", "seed=nan is not a whole number."),
        ("train", "seed=true", "seed=true is not a whole number."),
        ("train", "seed=", "seed= is not a whole number."),
        ("train", "optimizer.eps=1e999", "optimizer.eps=inf is not a number."),
        ("train", "model.d_model=1e30", "model.d_model=1e+30 is too large; whole numbers go up to"),
        ("generate", "seed=18446744073709551616", "seed=18446744073709551616 is too large; whole numbers go up to"),
        ("generate", "samples=0", "samples=0 must be at least 1."),
        ("evaluate", "seq_len=[16,1e30]", "seq_len=[16, 1e+30] must be a whole number from 1, or a list of them."),
        ("prepare", "workers=1e30", "workers=1e30 is too large; whole numbers go up to"),
    ],
)
def test_say_the_range(run_words, command, argument, message):
    outcome = run_words(command, *OTHERS[command], argument, task=task_of(command))
    assert outcome.code == 2 and outcome.err.startswith(f"ConfigError: {message}")
    assert len(outcome.err.splitlines()) == 1
