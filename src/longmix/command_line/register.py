"""Registers with Hydra, before it composes, the schemas, the resolvers, and patterns of mixers."""

import re

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from longmix import naming
from longmix.config import EvaluateConfig, GenerateConfig, PrepareConfig, TrainConfig, hydra_schema

LONGEST_FILE_NAME = 200  # file systems take 255 bytes; a few are left for what others add


def register_types() -> None:
    """Make schemas, resolvers and mixer patterns known to Hydra."""
    ConfigStore.instance().store(name="train_schema", node=hydra_schema(TrainConfig))
    ConfigStore.instance().store(name="evaluate_schema", node=hydra_schema(EvaluateConfig))
    ConfigStore.instance().store(name="generate_schema", node=hydra_schema(GenerateConfig))
    ConfigStore.instance().store(name="prepare_schema", node=hydra_schema(PrepareConfig))
    OmegaConf.register_new_resolver("file_name", file_name, replace=True)
    naming.register()
    OmegaConf.register_new_resolver("windows", windows, replace=True)
    Plugins.instance().register(MixerPatternSource)
    Plugins.instance().register(MixerPatternEntry)


def file_name(text: str) -> str:
    """`text` as a folder's name: without awkward characters, and no longer than a file system allows."""
    return re.sub(r"[^\w.,=-]+", "-", str(text), flags=re.ASCII).strip("-")[:LONGEST_FILE_NAME]


def windows(tokens: int, seq_len: int) -> int:
    """The number of windows of `seq_len` tokens in `tokens`, rounded down, at least one."""
    return max(1, tokens // seq_len)


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
        """The scheme of its entry in Hydra's search path."""
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
        """True: this source needs no file or package."""
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


class MixerPatternEntry(SearchPathPlugin):
    """Adds patterns of mixers to every command, whatever else `hydra.searchpath` names."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the entry of patterns."""
        search_path.append("longmix", f"{MixerPatternSource.scheme()}://mixer")


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
