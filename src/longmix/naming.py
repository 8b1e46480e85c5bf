"""Names of runs and sweeps, and the folders they stand for.

A run is `runs/<name>`; a sweep is `multirun/<time>`, and each of its runs is named by the words that were swept. What
the clock names is never shared: two that begin in one second get two folders.
"""

import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from longmix.distributed.ranks import process_rank
from longmix.errors import ConfigError
from longmix.files import free_folder
from longmix.invocation import Invocation, words_of_task

if TYPE_CHECKING:
    from longmix.config import TrainConfig

RUNS = "runs"
LONGEST_NAME_BYTES = 240  # file systems take 255
LONGEST_SWEEP_NAME = 120
SWEEP_FILE = "multirun.yaml"
"""Hydra writes it into each sweep's folder."""

CLOCK = "${now:"
"""Part of an unresolved name that the clock gives; names of the user lack it."""


def register() -> None:
    """Make the resolvers of configs/train.yaml known to OmegaConf."""
    OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)
    OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)


def check_name(name: str) -> None:
    """Refuse a name that leaves the folder of runs, or that is hard to see, to type or to store.

    `/` puts a run into a subfolder, and blanks may stand inside.

    Raises:
        ConfigError: says what is wrong with it and what is allowed.
    """
    problem = _problem(name)
    if problem is not None:
        raise ConfigError(f"name={name!r} {problem}. A name is one folder below {RUNS}/, or several as in study/first.")


def _problem(name: str) -> str | None:
    if not name:
        return "is empty; it names the run's folder"
    if name.startswith("/") or (len(name) > 1 and name[1] == ":") or ".." in name.split("/"):
        return f"leads out of {RUNS}/; leave out what comes before the last part"
    if "${" in name:
        return "holds ${, which begins an interpolation; leave it out"
    for part in name.split("/"):
        if not part:
            return "has an empty part between two slashes"
        if part.startswith("."):
            return f"has a part that begins with a dot, {part!r}, and such folders are hidden"
        if part != part.strip() or not part.isprintable():
            return "has blanks at an end, or characters that cannot be seen"
        if len(part.encode(errors="replace")) > LONGEST_NAME_BYTES:
            return f"is longer than {LONGEST_NAME_BYTES} bytes"
    return None


def run_folder(name: Any) -> str:
    """The folder that Hydra makes for a run; for a name that will be refused, a harmless one."""
    return f"{RUNS}/{name}" if _problem(str(name)) is None else f"{RUNS}/.refused"


@dataclass(frozen=True)
class RunPlace:
    """The place of a run, as the command line tells it.

    Attributes:
        folder: the run's, unless it is continued elsewhere.
        name: the run's.
        named: the user chose them, and not the clock; in a sweep, whose runs are numbered, this tells of the name.
    """

    folder: Path
    name: str
    named: bool

    @classmethod
    def of(cls, config: "TrainConfig", by_clock: bool, invocation: Invocation) -> "RunPlace":
        """The place of a run.

        Args:
            config: the run's, with mixer and model of the checkpoint that it begins from.
            by_clock: the clock gave the configuration its name; see `named_by_clock`.
            invocation: how it was asked for.

        Raises:
            ConfigError: see `check_name`.
        """
        name, folder = config.name, invocation.folder
        check_name(name)
        if invocation.named is not None:
            return cls(folder, name, invocation.named)
        if invocation.in_sweep:
            return cls(folder, f"{folder.parent.name}_{folder.name}" if by_clock else name, not by_clock)
        if not by_clock or folder != Path(run_folder(name)).absolute():
            return cls(folder, name, True)
        own = _with_own_mixer(name, config, invocation.choices)
        return cls(folder.with_name(own), own, False)


def named_by_clock(config: DictConfig) -> bool:
    """Whether the clock gives a configuration its name, which is not yet resolved."""
    return CLOCK in str(OmegaConf.to_container(config, resolve=False)["name"])  # type: ignore[index,call-overload]


def _with_own_mixer(name: str, config: "TrainConfig", choices: Mapping[str, str]) -> str:
    """The name that the clock gave, with mixer and model of the checkpoint that the run begins from."""
    if config.checkpoint is None:
        return name
    sizes = f"{config.model.number('num_layers')}x{config.model.number('d_model')}"
    mixer = mixer_word(config.mixer.entries)
    if config.keep is not None:  # which layers those are may be measured later
        kept = "+".join(map(str, config.keep)) if isinstance(config.keep, list) else config.keep
        mixer = f"{choices['mixer']}_keep={kept}"
    own = f"{_file_name(mixer)}_{sizes}"
    return name.replace(f"_{_file_name(choices['mixer'])}_{choices['model']}_", f"_{own}_", 1)


def mixer_word(mixer: Mapping[str, Any]) -> str:
    """The name of a mixer by the entries of its choice: a pattern as it is written, or its module, named like its file.

    A class of another package, whose module may have any name, is called by its own.
    """
    if "pattern" in mixer:
        return "+".join(_repeated(name, len(list(each))) for name, each in itertools.groupby(mixer["pattern"]))
    path, _, kind = str(mixer["_target_"]).rpartition(".")
    module = path.rpartition(".")[2]
    is_own = path.startswith("longmix.mixers.") or module.replace("_", "").lower() == kind.lower()
    return module if is_own else kind


def _repeated(name: str, count: int) -> str:
    return name if count == 1 else f"{name}*{count}"


def sweep_name(number: Any, words: str) -> str:
    """The folder of a sweep's run: its number, and what was swept in it, as in `0,mixer=flash,seed=1`.

    What is too long for a folder's name is shortened value by value, so that none loses what tells it from the others.
    """
    parts = [_file_name(word.removeprefix("++")) for word in words.split(",")] if words else []
    room = LONGEST_SWEEP_NAME // max(1, len(parts))
    if len(",".join(parts)) > LONGEST_SWEEP_NAME:
        parts = [_shortened(part, room) for part in parts]
    return ",".join([str(number), *filter(None, parts)])


def _shortened(part: str, room: int) -> str:
    """The beginning and the end of a word, with what tells it from another that has both in common."""
    if len(part) <= room:
        return part
    own = hashlib.sha256(part.encode()).hexdigest()[:6]
    left = max(room - len(own) - 2, 2)
    return f"{part[: left // 2]}~{part[-(left - left // 2) :]}~{own}"


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=+~-]+", "-", str(text), flags=re.ASCII).strip("-")


class SweepFolder(Callback):
    """Gives each sweep a folder of its own before Hydra makes it, and names the runs in it by the swept words alone.

    What it decides goes on as words of the command line, as each run of a sweep is composed anew, maybe elsewhere.

    Attributes:
        begun: the new folders of each sweep of this process that has not ended: its own, and those above it.
    """

    begun: ClassVar[list[list[Path]]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before a sweep begins."""
        hydra = config.hydra
        same = same_words(words_of_task(hydra), (hydra.sweeper.get("params") or {}).keys())
        quoted = ",".join(f"'{word}'" for word in same)
        words = [f"hydra.job.config.override_dirname.exclude_keys=[{quoted}]"]
        by_clock = CLOCK in str(OmegaConf.to_container(hydra.sweep, resolve=False)["dir"])  # type: ignore[index,call-overload]
        folder = Path(str(hydra.sweep.dir))
        is_new = by_clock or not folder.exists()
        above = [path.absolute() for path in folder.parents if not path.exists()]
        if by_clock and process_rank() == 0:
            folder = free_folder(folder)
            words.append(f"hydra.sweep.dir='{folder}'")
            with open_dict(hydra):
                hydra.sweep.dir = str(folder)
        with open_dict(hydra):
            hydra.overrides.hydra.extend(words)
        if is_new and process_rank() == 0:
            self.begun.append([folder.absolute(), *above])


def remove_unused_sweeps() -> None:
    """Remove the folders of this process's sweeps that hold no result: those of runs that write elsewhere or failed.

    A folder that was there before stays, and so does what the user or a launcher has put into one.
    """
    while SweepFolder.begun:
        folder, *above = SweepFolder.begun.pop()
        with contextlib.suppress(OSError):
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
                    path.rmdir()
            if {path.name for path in folder.iterdir()} <= {SWEEP_FILE}:
                (folder / SWEEP_FILE).unlink(missing_ok=True)
                for path in (folder, *above):
                    path.rmdir()


def same_words(words: Iterable[str], swept: Iterable[str] = ()) -> list[str]:
    """The words of a sweep's command line that are the same in all of its runs.

    Args:
        words: as they were given.
        swept: others that the sweeper varies.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(words))
    last = {override.key_or_group: override for override in parsed}  # of two equal words the last one counts
    return [name for name, override in last.items() if not override.is_sweep_override() and name not in set(swept)]
