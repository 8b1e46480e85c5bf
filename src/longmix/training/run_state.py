"""What a checkpoint says of a run besides its module: what it continues with, and what it was made with."""

from dataclasses import dataclass, field

BY_POSITION = "validation_by_position"
"""Entry of a checkpoint's `info.json`, beside `validation`, where the validation came after the checkpoint."""


@dataclass
class RunState:
    """Values that a resumed run continues, besides the module.

    Attributes:
        training_seconds: time spent in steps, over all processes of the run's history.
        peak_memory_bytes: the most that any process held while it trained; see `hardware.peak_memory_bytes`.
        validation: the last validation's figures, empty before the first.
        validation_by_position: its loss by position.
    """

    training_seconds: float = 0.0
    peak_memory_bytes: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    validation_by_position: list[dict[str, float]] = field(default_factory=list)


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
