"""Where a run starts: fresh, or from a checkpoint that fits it."""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from longmix.checkpoints import Checkpoint, CheckpointStore, chosen_checkpoint, open_checkpoint
from longmix.checkpoints.contents import check_run_state, rebuilding
from longmix.checkpoints.processes import Processes
from longmix.config import Node, flattened
from longmix.errors import CheckpointError, ConfigError
from longmix.files import remove_leftovers, storage_errors
from longmix.training.place import was_restarted

MUST_MATCH = (
    "mixer",
    "model",
    "data.corpus",
    "tokenizer",
    "optimizer._target_",
    "seq_len",
    "batch_size",
    "seed",
    "trainable",
    "tuning",
)
"""Keys that fix what the saved numbers mean; a run may not be continued with others."""

SAME_RUN = (*MUST_MATCH, "optimizer", "schedule", "max_steps", "max_tokens", "checkpoint")
"""Keys that tell `resume=auto` whether an earlier run is this one."""

SHOWN_DIFFERENCES = 5

log = logging.getLogger(__name__)


@dataclass
class Start:
    """Where a run begins.

    Attributes:
        folder: the run's folder.
        step: steps already taken.
        state: the checkpoint's state without weights and optimizers' tensors, or None for a fresh run.
        created: Hydra's folder for this process, removed if it stays empty because the run lives elsewhere.
        saved: the checkpoint, which holds the tensors.
    """

    folder: Path
    step: int
    state: dict[str, Any] | None
    created: Path
    saved: Checkpoint | None = None

    def take_folder(self, config: Node) -> None:
        """Write the configuration into the run's folder, and clear away what killed processes left there.

        Raises:
            StorageError: the folder cannot be written.
        """
        self.leave_created()
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(config), self.folder / "config.yaml")
        remove_leftovers(self.folder / "checkpoints")

    def leave_created(self) -> None:
        """Remove the folder that Hydra made for this process, if the run lives elsewhere."""
        if self.folder != self.created:
            with contextlib.suppress(OSError):
                self.created.rmdir()

    def check_data(self, fingerprint: dict[str, Any]) -> None:
        """Refuse to continue on other data than the checkpoint saw.

        Raises:
            CheckpointError: names what differs.
        """
        if self.state is None or self.state["data_fingerprint"] == fingerprint:
            return
        saved = self.state["data_fingerprint"]
        changed = [
            f"{key} was {saved.get(key)} and is {value}"
            for key, value in fingerprint.items()
            if saved.get(key) != value
        ]
        raise CheckpointError(
            f"the data are not those of the checkpoint: {'; '.join(changed)}. Restore the corpus, or start a new run."
        )


def find_start(config: Node, folder: Path, processes: Processes | None = None) -> Start:
    """Decide by `resume` where the run in Hydra's output `folder` begins.

    Of several processes, which may each have a folder of their own and look at different moments, the first decides.

    Args:
        config: the resolved configuration.
        folder: Hydra's, for this process.
        processes: all that train, which must all call it; None for one.

    Raises:
        ConfigError: a fresh run would mix with an earlier one in the same folder.
        CheckpointError: the checkpoint is missing, damaged, or of another model, corpus or batch.
    """
    processes = processes or Processes()
    home, checkpoint = processes.first(lambda: choose_start(config, folder))
    if checkpoint is None:
        return Start(home, 0, None, folder)
    loaded: list[tuple[Checkpoint, dict[str, Any]]] = []
    processes.each(lambda: loaded.append(_load(config, checkpoint)))  # they exchange errors, and not what is loaded
    saved, state = loaded[0]
    return Start(home, state["step"], state, folder, saved)


def choose_start(config: Node, folder: Path) -> tuple[Path, Path | None]:
    """The folder where the run in Hydra's output `folder` goes on, and the checkpoint it begins from, if any.

    A command that its launcher runs again after a failure continues what it began in the same folder, whatever `resume`
    says.

    Raises:
        ConfigError, CheckpointError: as in `find_start`, but for what only a checkpoint's content tells.
    """
    own = CheckpointStore(folder / "checkpoints").latest()
    resume = config["resume"]
    if resume is None:
        if own is not None and not was_restarted():
            raise ConfigError(
                f"{folder} already holds a run ({own.name}); continue it with resume=auto, or choose another name."
            )
        return folder, own
    if resume == "auto":
        checkpoint = own or _newest_of_same_run(config, folder)
        if checkpoint is None:
            log.info("resume=auto: no earlier run of this configuration; starting a new one.")
            return folder, None
    else:
        checkpoint = chosen_checkpoint(resume)
    return _home(checkpoint, folder), checkpoint


def _load(config: Node, checkpoint: Path) -> tuple[Checkpoint, dict[str, Any]]:
    saved = open_checkpoint(checkpoint)
    state = saved.rest()
    if "run" not in state:
        raise CheckpointError(f"{checkpoint} holds a model and no run to continue; begin from it with checkpoint=.")
    with rebuilding(checkpoint):
        check_run_state(state)
    _check_same(config, state["config"], checkpoint)
    return saved, state


def _home(checkpoint: Path, folder: Path) -> Path:
    """The run goes on in its folder, unless it is continued from the middle: then the rest of it stays as it is."""
    store = CheckpointStore(checkpoint.parent)
    if checkpoint.parent.name == "checkpoints" and store.latest() == checkpoint:
        return checkpoint.parent.parent
    log.info("%s is not the newest checkpoint of its run; continuing in %s.", checkpoint, folder)
    return folder


def _newest_of_same_run(config: Node, folder: Path) -> Path | None:
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        candidates = folder.parent.parent.glob("*/*")
    else:
        candidates = folder.parent.glob("*")
    found = []
    for candidate in candidates:
        latest = CheckpointStore(candidate / "checkpoints").latest()
        path = candidate / "config.yaml"
        if latest is None or not path.is_file():
            continue
        saved = OmegaConf.to_container(OmegaConf.load(path))
        if all(_value(saved, key) == _value(config, key) for key in SAME_RUN):
            found.append((latest.stat().st_mtime, latest))
    return max(found)[1] if found else None


def _check_same(config: Node, saved: Node, checkpoint: Path) -> None:
    changed = [difference for key in MUST_MATCH for difference in _differences(saved, config, key)]
    if changed:
        more = f" and {len(changed) - SHOWN_DIFFERENCES} more" if len(changed) > SHOWN_DIFFERENCES else ""
        raise CheckpointError(
            f"{checkpoint} is of another run: {'; '.join(changed[:SHOWN_DIFFERENCES])}{more}. Use its settings, or "
            "start a new run."
        )


def _differences(saved: Node, config: Node, key: str) -> list[str]:
    """Every setting at or below `key` that is not the same, as a phrase."""
    before, now = (flattened({key: _value(node, key)}) for node in (saved, config))
    return [
        f"{name} was {before.get(name, 'absent')} and is {now.get(name, 'absent')}"
        for name in {**before, **now}
        if before.get(name, "absent") != now.get(name, "absent")
    ]


def _value(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config
