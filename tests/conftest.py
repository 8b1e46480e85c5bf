"""Fixtures that several test folders share: composed configurations, tiny runs, and the entry points as processes."""

import contextlib
import functools
import gc
import logging
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from longmix import cli

if TYPE_CHECKING:
    from longmix.model.backbone import LanguageModel

ROOT = Path(__file__).parents[1]

# nohup and shells that start a job in the background have signals ignored, also in what the tests start
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side share the cores; more threads than cores crawl
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start; this process read it with `import torch`
    os.environ.setdefault("MKL_NUM_THREADS", "1")
    torch.set_num_threads(1)

TINY = (
    "logger=csv",
    "batch_size=2",
    "max_steps=2",
    "data.validation_tokens=256",
    "model.num_layers=1",
    "model.d_model=32",
    "model.mlp_hidden=32",
    "trainer=cpu",
)
"""Overrides of a run that takes a second."""

SMALL_VOCABULARY = 20
"""Token ids of `small_model`."""


def composed(overrides: list[str], entry_point: str, output: Path) -> DictConfig:
    """What the entry point's task would be given, with Hydra's own settings in place until the next call."""
    cli.register()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose(entry_point, overrides=overrides, return_hydra_config=True)
    with open_dict(config):
        config.hydra.runtime.output_dir = str(output)
        HydraConfig.instance().set_config(config)
        del config["hydra"]
    return config


Compose = Callable[..., DictConfig]


@pytest.fixture(scope="module", autouse=True)
def hydra_settings_of_one_file() -> Iterator[None]:
    """Hydra's settings that a file's fixtures leave do not reach the next file."""
    yield
    HydraConfig.instance().cfg = None


def seed_all() -> None:
    """Start the generators that tests draw from without a seed of their own."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def random_numbers_of_one_file() -> None:
    """A file's fixtures draw the same numbers whichever files ran before in this process."""
    seed_all()


@pytest.fixture(autouse=True)
def random_numbers_of_one_test(random_numbers_of_one_file) -> None:
    """A test draws the same numbers whichever tests ran before in this process."""
    seed_all()


@pytest.fixture(autouse=True)
def log_handlers_of_one_test() -> Iterator[None]:
    """Handlers whose stream an earlier test has closed do not print errors into what a later one captures."""
    for handler in list(logging.root.handlers):
        if getattr(getattr(handler, "stream", None), "closed", False):
            logging.root.removeHandler(handler)
    yield


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Nothing of twenty thousand tests is garbage: it is not searched while they are collected, nor ever after."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_unconfigure() -> None:
    """At exit modules that look for leaks, such as nanobind's, find what is to be freed."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test with `sampled(n)`, one in n stays fast, in turn, so that every parameter is met."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is None or item.get_closest_marker("slow"):
            continue
        (every,), test = mark.args, item.nodeid.partition("[")[0]
        if (seen[test] + seen[test] // every) % every:
            item.add_marker("slow")
        seen[test] += 1


@pytest.fixture
def compose_config(tmp_path) -> Iterator[Compose]:
    """`compose_config("seq_len=32", ..., entry_point="train")` composes as the command line does."""

    def run(*overrides: str, entry_point: str = "train", output: Path = tmp_path) -> DictConfig:
        return composed(list(overrides), entry_point, output)

    yield run
    HydraConfig.instance().cfg = None


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    """Token files that all runs of the session share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_overrides(shared_cache) -> list[str]:
    """Overrides of a run that takes a second, on the default corpus."""
    return [*TINY, f"data.cache_dir={shared_cache}"]


@pytest.fixture
def limited_file_size() -> Callable[[int], AbstractContextManager[None]]:
    """`with limited_file_size(1000):` lets no file of this process grow beyond, as if the disk were full."""

    @contextlib.contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)

    return limited


@dataclass
class Finished:
    """A process that ended.

    Attributes:
        code: its exit code.
        out, err: what it wrote.
        cpu_seconds: user and system time, which a busy machine changes less than wall time.
    """

    code: int
    out: str
    err: str
    cpu_seconds: float


@pytest.fixture
def run_process(tmp_path) -> Callable[..., Finished]:
    """`run_process("train.py", "-h")` runs an entry point in the test's folder; a dotted name is run with `-m`."""

    def run(program: str, *arguments: str, python: tuple[str, ...] = ()) -> Finished:
        place = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
        command = [sys.executable, *python, *place, *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Finished(done.returncode, done.stdout, done.stderr, seconds)

    return run


@pytest.fixture(scope="session", name="composed")
def composed_words() -> Compose:
    """`composed([overrides], entry_point, output)`, for fixtures that outlive a test; it leaves Hydra's settings."""
    return composed


@pytest.fixture(scope="session")
def run_training(tmp_path_factory) -> Callable[..., Path]:
    """`run_training("seq_len=32", ...)` trains here, with `base` before the words, and returns the run's folder."""
    from longmix.training.run import train

    def run(*overrides: str, base: Sequence[str] = TINY) -> Path:
        folder = tmp_path_factory.mktemp("run")
        try:
            train(composed([*base, *overrides], "train", folder))
        finally:
            HydraConfig.instance().cfg = None
        return folder

    return run


@pytest.fixture(scope="session")
def small_config(tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """The resolved configuration of a small model, composed once a session since that takes longer than the model."""
    from small_mixers import small_mixer

    from longmix.config import resolved

    folder = tmp_path_factory.mktemp("small")

    @functools.cache
    def compose_small(*overrides: str) -> dict[str, Any]:
        sizes = ("model.d_model=64", "model.num_layers=2", "model.num_heads=4", "model.mlp_hidden=32")
        config = resolved(composed([*sizes, *overrides], "train", folder))
        HydraConfig.instance().cfg = None
        if "pattern" not in config["mixer"]:
            config["mixer"] = small_mixer(config["mixer"], 8)
        return config

    return compose_small


@pytest.fixture
def small_model(small_config) -> Callable[..., "LanguageModel"]:
    """`small_model("flash")` is a model of 2 layers with that mixer, with no weight at zero, in evaluation mode."""
    import torch

    from longmix.config import ModelConfig
    from longmix.model.build import build_model

    def build(mixer: str, *overrides: str, dtype: torch.dtype = torch.float64) -> "LanguageModel":
        torch.manual_seed(3)
        model = build_model(ModelConfig.of(small_config(f"mixer={mixer}", *overrides)), SMALL_VOCABULARY)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.abs().max() > 0:
                    parameter.normal_(std=0.2)
        return model.to(dtype).eval()

    return build
