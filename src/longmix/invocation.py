"""How a run was asked for: facts from the command line or a Python caller besides the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf


@dataclass(frozen=True)
class Invocation:
    """The facts of a call besides its configuration.

    Attributes:
        folder: the run's folder, unless it is continued elsewhere.
        words: given by the user, as in `seq_len=64`.
        choices: the file that each group was chosen from, by group.
        swept: words that differ between the runs of the sweep that it is one of; None outside a sweep.
        named: the user chose the folder; None where the name tells.
        is_command: this process does nothing else.
        folders: those that were searched for files of choices, besides longmix's own.
    """

    folder: Path
    words: tuple[str, ...] = ()
    choices: Mapping[str, str] = field(default_factory=dict)
    swept: tuple[str, ...] | None = None
    named: bool | None = None
    is_command: bool = False
    folders: tuple[Path, ...] = ()

    @property
    def in_sweep(self) -> bool:
        """Whether it is one of the runs of a sweep."""
        return self.swept is not None

    @classmethod
    def of_command(cls) -> "Invocation":
        """The invocation of the task that Hydra has begun in this process."""
        hydra = HydraConfig.get()
        words = words_of_task(hydra)
        swept = None
        if hydra.mode == RunMode.MULTIRUN:
            same = set(hydra.job.config.override_dirname.exclude_keys)
            swept = tuple(word for word in map(_key, words) if word not in same)
        is_command = hydra.mode == RunMode.RUN
        choices = dict(hydra.runtime.choices)
        return cls(Path(hydra.runtime.output_dir), words, choices, swept, None, is_command, searched(hydra))


def searched(hydra: HydraConf | DictConfig) -> tuple[Path, ...]:
    """The folders in which Hydra looked for files, the first one that has a file counting."""
    sources = hydra.runtime.config_sources
    return tuple(Path(source.path) for source in sources if source.schema == "file" and source.path)


def words_of_task(hydra: HydraConf | DictConfig) -> tuple[str, ...]:
    """The words as they were given: a `${...}` in one is the configuration's, not Hydra's to carry out."""
    return tuple(OmegaConf.to_container(hydra.overrides.task, resolve=False))  # type: ignore[arg-type]


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].partition("@")[0]
