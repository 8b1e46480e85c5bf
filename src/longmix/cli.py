"""What the entry points share before anything heavy is imported: one-line errors, run names, mixer patterns."""

import contextlib
import functools
import importlib.metadata
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.types import RunMode
from omegaconf import OmegaConf

from longmix.config import EvaluateConfig, GenerateConfig, PrepareConfig, TrainConfig
from longmix.errors import ConfigError, Interrupted, LongmixError, ProcessLost
from longmix.startup import INTERRUPTED
from longmix.training.place import leave, own_place

LONGEST_FILE_NAME = 200  # file systems take 255 bytes; a few are left for what others add
PATH_WORDS = ("checkpoint", "states", "resume", "output", "prompt_file", "load", "save")
TEXT_WORDS = ("prompt",)
PLUGINS = {
    "hydra-optuna-sweeper": ("sweep", {"hydra/sweeper=search", "hydra/sweeper=optuna"}),
    "hydra-submitit-launcher": (
        "slurm",
        {f"hydra/launcher={choice}" for choice in ("processes", "slurm", "submitit_local", "submitit_slurm")},
    ),
}
"""Packages that are not always installed: the extra that brings each, and the choices that need it."""


def register() -> None:
    """Make schemas, resolvers and mixer patterns known to Hydra, and put the command line right."""
    register_types()
    sys.argv[1:] = command_line(sys.argv[1:])
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(help_text(Path(sys.argv[0]).resolve()))
        sys.exit(0)
    try:
        check_plugins(sys.argv[1:])
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def register_types() -> None:
    """Make schemas, resolvers and mixer patterns known to Hydra."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)
    ConfigStore.instance().store(name="prepare_schema", node=PrepareConfig)
    OmegaConf.register_new_resolver("file_name", file_name, replace=True)
    OmegaConf.register_new_resolver("windows", windows, replace=True)
    Plugins.instance().register(MixerPatternSource)


def help_text(script: Path) -> str:
    """The help that a script's configuration holds, with every group's choices.

    Hydra's own `--help` also lists its internal groups, which takes longer than everything else together.
    """
    configs = script.parent / "configs"
    choices: dict[str, list[str]] = {}
    for path in sorted(configs.glob("*/**/*.yaml")):
        choices.setdefault(path.parent.relative_to(configs).as_posix(), []).append(path.stem)
    groups = [f"{group}: {', '.join(names)}" for group, names in sorted(choices.items())]
    template = OmegaConf.load(configs / f"{script.stem}.yaml").hydra.help.template
    return template.replace("$APP_CONFIG_GROUPS", "\n".join(groups))


def check_plugins(arguments: list[str]) -> None:
    """Refuse a sweeper or launcher whose package is not installed; Hydra would only say that it is not there.

    Raises:
        ConfigError: naming the extra to install.
    """
    for package, (extra, choices) in PLUGINS.items():
        for choice in choices & set(arguments):
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                raise ConfigError(f"{choice} needs {package}; pip install 'longmix[{extra}]' brings it.") from None


def command_line(arguments: list[str]) -> list[str]:
    """The arguments as Hydra should see them: `--cfg job` prints values, and what is a path or a prompt stays as it is.

    A sweep names its folders like `0,seed=1`, which Hydra would refuse or take for a list unless it is quoted.
    """
    arguments = [_quoted(argument) for argument in arguments]
    asks_for_job = re.search(r"(^| )(--cfg|-c)[ =]?job( |$)", " ".join(arguments))
    return [*arguments, "--resolve"] if asks_for_job and "--resolve" not in arguments else arguments


def _quoted(argument: str) -> str:
    word, _, text = argument.partition("=")
    is_path = word in PATH_WORDS and not re.fullmatch(r"[\w./-]*", text, re.ASCII) and Path(text).exists()
    is_text = word in TEXT_WORDS and text[:1] not in ("", "[", "'", '"')
    if not (is_path or is_text):
        return argument
    return hydra_word(word, text)


def hydra_word(word: str, text: str) -> str:
    """`word=text` as an argument from which Hydra reads `text` as it is."""
    # Hydra reads a backslash as itself unless a quote follows, and `${` as an interpolation.
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text, count=0)
    escaped = escaped.replace("${", "\\${")
    return f"{word}='{escaped}'"


def file_name(text: str) -> str:
    """`text` without what is awkward in a folder's name, and not longer than a file system takes."""
    return re.sub(r"[^\w.,=-]+", "-", str(text), flags=re.ASCII).strip("-")[:LONGEST_FILE_NAME]


def windows(tokens: int, seq_len: int) -> int:
    """How many windows of `seq_len` tokens make `tokens` together, rounded down, and at least one."""
    return max(1, tokens // seq_len)


def entry_point(task: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Run a Hydra task; an error meant for the user is printed alone and ends the process with its exit code.

    In a sweep the other runs still take place, unless a signal asked for the end; Hydra reports the failure after them.
    """

    @functools.wraps(task)
    def run(config: Any) -> Any:
        try:
            result = task(config)
        except LongmixError as error:
            message = f"{type(error).__name__}: {error}"
            if _speaks(error):
                print(message, file=sys.stderr)
            _remove_unused_folder()
            if isinstance(error, Interrupted) and error.hand_on is not None:
                return error.hand_on()
            if HydraConfig.get().mode == RunMode.MULTIRUN and not isinstance(error, Interrupted):
                raise CompactHydraException(message) from None
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            sys.exit(INTERRUPTED)
        if own_place() is not None and HydraConfig.get().mode == RunMode.RUN:
            leave()
        return result

    return run


def _speaks(error: LongmixError) -> bool:
    """Whether this process of several is the one to tell the user."""
    place = own_place()
    if place is None:
        return True
    if isinstance(error, ProcessLost) and place.launcher == "longmix":
        return False  # the launcher knows more
    return place.rank == 0 or not error.shared


def _remove_unused_folder() -> None:
    """Hydra makes the run's folder before the task begins; a refused run should leave nothing behind."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder != Path.cwd():
        with contextlib.suppress(OSError):  # it holds something, and stays
            folder.rmdir()


class MixerPatternSource(ConfigSource):
    """Composes `mixer=<name>*<count>+<name>...` from the files in configs/mixer.

    `mixer=sliding_window*3+flash` makes the node

        pattern: [sliding_window, sliding_window, sliding_window, flash]     # repeated over the layers
        sliding_window: <configs/mixer/sliding_window.yaml>
        flash: <configs/mixer/flash.yaml>

    so that `mixer.sliding_window.window=128` reaches one member's settings.
    """

    @staticmethod
    def scheme() -> str:
        """The scheme that `hydra.searchpath` names."""
        return "mixer-pattern"

    def load_config(self, config_path: str) -> ConfigResult:
        """The synthesised node for a pattern."""
        pattern = _parsed_pattern(config_path)
        if pattern is None:
            raise ConfigLoadError(f"{config_path} is not a mixer pattern")
        members = list(dict.fromkeys(pattern))
        config = OmegaConf.create({"defaults": [f"{name}@{name}" for name in members], "pattern": pattern})
        return ConfigResult(
            config=config, path=f"{self.scheme()}://{config_path}", provider=self.provider, header={"package": None}
        )

    def available(self) -> bool:
        """There is nothing to reach."""
        return True

    def is_group(self, config_path: str) -> bool:
        """Patterns are options of a group, not groups."""
        return False

    def is_config(self, config_path: str) -> bool:
        """Whether `config_path` is a pattern, which a plain name is not."""
        return _parsed_pattern(config_path) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> "list[str]":
        """Patterns cannot be listed."""
        return []


def _parsed_pattern(config_path: str) -> "list[str] | None":
    group, _, text = config_path.removesuffix(".yaml").partition("/")
    if group != "mixer" or not re.search(r"[*+]", text):
        return None
    pattern: list[str] = []
    for term in text.split("+"):
        match = re.fullmatch(r"(\w+)(?:\*([1-9]\d*))?", term)
        if match is None:
            return None
        pattern += [match[1]] * int(match[2] or 1)
    return pattern
