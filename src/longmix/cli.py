"""What the entry points share before anything heavy is imported: one-line errors, run names, mixer patterns."""

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf

from longmix.config import EvaluateConfig, TrainConfig
from longmix.errors import LongmixError

INTERRUPTED = 130


def register() -> None:
    """Make the schema, the name resolver and the mixer patterns known to Hydra, and let `--cfg job` print values."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
    OmegaConf.register_new_resolver("file_name", file_name, replace=True)
    Plugins.instance().register(MixerPatternSource)
    if "--cfg" in sys.argv and "job" in sys.argv and "--resolve" not in sys.argv:
        sys.argv.append("--resolve")


def file_name(text: str) -> str:
    """`text` with everything that is awkward in a folder's name turned into a dash."""
    return re.sub(r"[^\w.=-]+", "-", str(text)).strip("-")


def entry_point(task: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Run a Hydra task; an error meant for the user is printed alone and ends the process with its exit code."""

    @functools.wraps(task)
    def run(config: Any) -> Any:
        try:
            return task(config)
        except LongmixError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            sys.exit(INTERRUPTED)

    return run


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
