"""A command run in this process, as far as its task."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.hydra_config import HydraConfig

from longmix import cli
from longmix.config import resolved

CONFIGS = Path(__file__).parents[2] / "configs"


class Outcome:
    """What a command line did.

    Attributes:
        code: the exit code; 0 where the task was called and returned.
        out, err: what was printed.
        configs: the resolved configuration of each run.
    """

    def __init__(self) -> None:
        self.code: Any = 0
        self.out = self.err = ""
        self.configs: list[dict[str, Any]] = []


def call(capsys: pytest.CaptureFixture, command: str, arguments: list[str], task: Callable | None = None) -> Outcome:
    """Run `command` with these arguments; its task only keeps the configuration."""
    outcome = Outcome()

    def main(config: Any) -> None:
        outcome.configs.append(resolved(config))
        if task is not None:
            task(config)

    before = sys.argv
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    sys.argv = [f"{command}.py", *arguments]
    capsys.readouterr()
    try:
        cli.register()
        cli.run(
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=command)(cli.entry_point(main)),
            command,
        )
    except SystemExit as end:
        outcome.code = end.code
    finally:
        sys.argv = before
        root.handlers[:], root.level = handlers, level  # Hydra's log to streams that end with the test
        HydraConfig.instance().cfg = None
    outcome.out, outcome.err = capsys.readouterr()
    return outcome


@pytest.fixture
def run_words(capsys, tmp_path, monkeypatch) -> Callable[..., Outcome]:
    """`run_words("train", "seed=1", ...)` runs a command up to its task, in the test's folder."""
    monkeypatch.chdir(tmp_path)
    return lambda command, *arguments, task=None: call(capsys, command, list(arguments), task)
