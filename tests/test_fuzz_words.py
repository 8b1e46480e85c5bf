"""Hostile words and values: every one is refused in one line, or is a configuration that works; never a traceback.

`FUZZ_CASES=5000 pytest tests/test_fuzz_words.py` tries more random command lines, and every value with every setting.
"""

import copy
import os
import random
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig

from longmix import cli
from longmix.command_line.schema import SCHEMAS
from longmix.config import TrainConfig, read, resolved
from longmix.errors import LongmixError
from longmix.training.run import check_config

CONFIGS = Path(__file__).parents[1] / "configs"
CASES = int(os.environ.get("FUZZ_CASES", "30"))
VALUES_OF_A_SETTING = 2 if CASES < 1000 else None  # drawn; None takes all

HOSTILE = [
    -1, 0, 1, 10**9, 10**30, -0.5, 0.5, 1e-300, float("nan"), float("inf"), "", None, [], {}, True, "x", "x" * 5000,
    [-1], ["x"],
]  # fmt: skip
TOO_LONG = {"model.num_layers", "data.task.pairs"}
"""Settings of which a billion is refused by their own tests, and slow in the others."""

GROUPS = {
    "mixer": None,
    "model": ["tiny"],
    "optimizer": ["muon", "adamw"],
    "schedule": None,
    "trainer": ["cpu"],
    "data": ["copying", "group_words", "induction", "mqar", "needle", "sotu", "variables", "text"],
    "tokenizer": ["bytes", "bpe"],
    "logger": None,
}
"""The choices whose settings are walked; None takes all."""


def leaves(node: dict[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        elif key != "_target_":
            yield (*prefix, key)


def refused_or_valid(node: dict[str, Any]) -> str | None:
    """What is wrong with how the configuration was taken; None if nothing is."""
    try:
        check_config(read(TrainConfig, node))
    except LongmixError as error:
        return f"more than a line: {error}" if "\n" in str(error) else None
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def faults(base: dict[str, Any], settings: list[tuple[str, ...]]) -> list[str]:
    found = []
    for path in settings:
        drawn = random.Random(".".join(path)).sample(HOSTILE, VALUES_OF_A_SETTING or len(HOSTILE))
        for value in drawn:
            if value == 10**9 and ".".join(path) in TOO_LONG:
                continue
            node = copy.deepcopy(base)
            place = node
            for part in path[:-1]:
                place = place[part]
            place[path[-1]] = value
            problem = refused_or_valid(node)
            if problem:
                found.append(f"{'.'.join(path)}={value!r:.40}: {problem}")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_takes_or_refuses_every_value(compose_config, tmp_path, monkeypatch, group):
    monkeypatch.chdir(tmp_path)
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * 9)
    seen: set[tuple[str, tuple[str, ...]]] = set()
    found = []
    for choice in GROUPS[group] or sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")):
        given = ["data.corpus.path=.", "data.corpus.validation_fraction=0.3"] if choice == "text" else []
        base = resolved(compose_config("trainer=cpu", "logger=none", f"{group}={choice}", *given))
        settings = [(group, *path) for path in leaves(base[group])]
        fresh = [path for path in settings if (base[group]["_target_"], path) not in seen]
        seen |= {(base[group]["_target_"], path) for path in fresh}
        found += faults(base, fresh)
    assert not found, "\n".join(found)


def test_every_word_takes_or_refuses_every_value(compose_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = resolved(compose_config("trainer=cpu", "logger=none"))
    words = [path for path in leaves(base) if path[0] not in GROUPS and path[0] != "block"]
    assert faults(base, words) == []


# --- random command lines ---

NAMES = """
seed seq_len name prompt stop checkpoint mixer mixer.window data data.corpus.path loop loop.log_every trust task lr x.y
müxer optimizer.learning_rate hydra.run.dir hydra.mode hydra/launcher mixer@x tokenizer.path match.parameters resume
data.task.pairs
""".split()  # noqa: SIM905

VALUES = """
1 -1 1e3 3.5 16k nan true null x flash flahs rwkv7*2+flash a*0+b [1,2] [a,'b'] {a:1} a,b a=b ~/x ??? ../.. choice(1,2)
range(1,1) glob(*) ${seed} ${nope} ${oc.env:NOPE} ${ 'a "b" \\ ] [ } ( ) #
""".split()  # noqa: SIM905
VALUES += ["", "é\n", "x" * 3000, "\udcff", "\x00", "two words"]

OPTIONS = "-m --multirun --cfg job -h --version --max_steps -x --info --resolve -- - help flash".split()  # noqa: SIM905


def random_line(draw: random.Random) -> list[str]:
    line = []
    for _ in range(draw.randrange(1, 4)):
        if draw.random() < 0.15:
            line.append(draw.choice(OPTIONS))
            continue
        sign = draw.choice(["", "", "", "", "+", "++", "~"])
        value = "".join(draw.choice(VALUES) for _ in range(draw.choice([1, 1, 1, 2])))
        line.append(f"{sign}{draw.choice([*NAMES, ''])}" + (f"={value}" if draw.random() < 0.95 else ""))
    return line


def resolved_only(config: Any) -> None:
    resolved(config)


def problem_of(command: str, capsys: pytest.CaptureFixture) -> str | None:
    """How the command of `sys.argv` was taken wrongly; None if it was refused in one line or ran."""
    main = hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=command)(cli.entry_point(resolved_only))
    code: Any = 0
    try:
        cli.run(main, command)
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        HydraConfig.instance().cfg = None
    printed = capsys.readouterr().err
    if code not in (0, 2) or "Traceback" in printed or "HYDRA_FULL_ERROR" in printed:
        return f"exit code {code}: {printed}"
    refusals = [line for line in printed.splitlines() if re.match("[A-Za-z]+Error: ", line)]
    if code == 2 and not (refusals and all(line.startswith("ConfigError: ") and len(line) < 2500 for line in refusals)):
        return f"refused by {printed}"
    return None


@pytest.mark.slow
def test_random_command_lines(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    draw = random.Random(0)
    cli.register()
    found = []
    for _ in range(CASES):
        command, line = draw.choice(list(SCHEMAS)), random_line(draw)
        monkeypatch.setattr("sys.argv", [f"{command}.py", *line])
        problem = problem_of(command, capsys)
        if problem:
            found.append(f"{command}.py {shlex.join(line)!a:.400}: {problem:.1000}")
    assert not found, "\n".join(found)
