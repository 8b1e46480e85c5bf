"""When a run ends: after all its steps, or earlier, after a validation that recalls enough."""

from collections.abc import Mapping
from dataclasses import dataclass

from longmix.config import TrainConfig
from longmix.data.training_data import TrainingData
from longmix.errors import ConfigError


@dataclass(frozen=True)
class Ending:
    """The end of a run.

    Attributes:
        total_steps: it ends after so many steps at the latest.
        stop_at_recall: it ends after a validation with at least this recall; None always takes all steps.
    """

    total_steps: int
    stop_at_recall: float | None

    def is_at(self, step: int, validation: Mapping[str, float]) -> bool:
        """Whether the run ends after `step` steps, given its last validation."""
        return step == self.total_steps or self.is_early(step, validation)

    def is_early(self, step: int, validation: Mapping[str, float]) -> bool:
        """Whether the validation after `step` steps, if that is the last one, recalls enough."""
        if self.stop_at_recall is None or not step or validation.get("step") != step:
            return False
        return validation.get("recall", -1.0) >= self.stop_at_recall


def check_stop_at_recall(config: TrainConfig, data: TrainingData) -> None:
    """Refuse `loop.stop_at_recall` where no validation can meet it.

    Raises:
        ConfigError: the data have no recall, nothing is validated before the end, or the run has stages.
    """
    wanted = config.loop.stop_at_recall
    if wanted is None:
        return
    word = f"loop.stop_at_recall={wanted}"
    if not data.makes_numbers:
        raise ConfigError(f"{word}: {data.label} has no recall, as only synthetic tasks do. Leave it out.")
    if config.loop.validate_every is None:
        raise ConfigError(f"{word} has no effect without loop.validate_every. Give it, or leave stop_at_recall out.")
    if config.stages is not None:
        raise ConfigError(f"{word}: a run with stages takes all their steps. Leave one of them out.")
