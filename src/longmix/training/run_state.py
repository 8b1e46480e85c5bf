"""What a checkpoint says of a run besides its module: what it continues with, and what it was made with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longmix.checkpoints import Checkpoint
from longmix.checkpoints.store import SKIPS_IN_A_ROW
from longmix.config import Plain
from longmix.training.averaging import UPDATES
from longmix.training.random_state import GeneratorStates
from longmix.training.spikes import SPIKES

BY_POSITION = "validation_by_position"
"""Entry of a checkpoint's `info.json`, beside `validation`, where the validation came after the checkpoint."""

STAGE_RESULTS = "stages"
"""Entry beside these: `RunState.stages`."""

LATER = ("transferred", STAGE_RESULTS, "spikes")
"""Entries of `RunState` that a checkpoint of an earlier version lacks, and one without them too."""

FINAL = "validation_final"
"""The validation after a stage on windows of the last stage's length."""


@dataclass
class RunState:
    """Values that a resumed run continues, besides the module.

    Attributes:
        training_seconds: time spent in steps, over all processes of the run's history.
        peak_memory_bytes: the most that any process held while it trained; see `hardware.peak_memory_bytes`.
        validation: the last validation's figures, empty before the first.
        validation_by_position: its loss by position.
        transferred: the validation before the first step of a run whose model took weights of one with other mixers.
        stages: the validation after the last step of each stage that is done, by the number of the stage.
        spikes: the steps that were left out as spikes.
    """

    training_seconds: float = 0.0
    peak_memory_bytes: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    validation_by_position: list[dict[str, float]] = field(default_factory=list)
    transferred: dict[str, float] = field(default_factory=dict)
    stages: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    spikes: list[int] = field(default_factory=list)

    def entries(self) -> dict[str, Any]:
        """What a checkpoint holds of it; a run without stages, spikes or a transfer has no entry of them."""
        return {key: value for key, value in vars(self).items() if key not in LATER or value}


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The data and the software that a run was trained with; a checkpoint holds each field under its name.

    Attributes:
        tokenizer: all that it is rebuilt from.
        data_fingerprint: of the data, which a run that continues must find again.
        versions: of Python and packages.
    """

    tokenizer: dict[str, object]
    data_fingerprint: dict[str, object]
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run as a checkpoint holds it; any version may have written it.

    Attributes:
        tensors: the checkpoint, whose tensors are read later, by each process its part.
        step: steps taken.
        steps_skipped, skips_in_a_row: steps left out, and how many of them were the last ones.
        written: the run's configuration.
        data_fingerprint: of the data it was trained on.
        run: the values that go on.
        random: the generators' states, of each process or of the first alone.
        optimizers: of each optimizer its groups and its state but for the tensors.
        spikes: the window of `longmix.training.spikes`; None if none was kept.
        ema_updates: steps in the average of the weights; None if there is none.
    """

    tensors: Checkpoint
    step: int
    steps_skipped: int
    skips_in_a_row: int
    written: Plain
    data_fingerprint: dict[str, object]
    run: RunState
    random: list[GeneratorStates] | GeneratorStates
    optimizers: list[dict[str, Any]]
    spikes: list[list[float]] | None = None
    ema_updates: int | None = None

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's folder."""
        return Path(self.tensors.checkpoint)

    @property
    def processes(self) -> int:
        """How many processes' generators it has."""
        return len(self.random) if isinstance(self.random, list) else 1

    @classmethod
    def of(cls, checkpoint: Checkpoint, content: dict[str, Any]) -> "SavedRun":
        """That of a checkpoint's content, which has passed `check_run_state`; call inside `rebuilding`."""
        return cls(
            tensors=checkpoint,
            step=content["step"],
            steps_skipped=content["steps_skipped"],
            skips_in_a_row=content.get(SKIPS_IN_A_ROW, 0),  # earlier versions did not say
            written=content["config"],
            data_fingerprint=content["data_fingerprint"],
            run=RunState(**content["run"]),
            random=content["random"],
            optimizers=content["optimizers"],
            spikes=content.get(SPIKES),
            ema_updates=content.get(UPDATES),
        )
