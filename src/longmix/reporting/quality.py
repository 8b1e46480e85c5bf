"""The measure by which runs are ranked."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longmix.reporting.settings import is_synthetic

if TYPE_CHECKING:
    from longmix.reporting.runs import Run


@dataclass(frozen=True)
class Quality:
    """Bits per byte of text; of synthetic data recall, or nats where that was not measured.

    Attributes:
        key: of the number in a validation.
        unit: in words.
        more_is_better: as with recall.
        decimals: that it is written with.
    """

    key: str
    unit: str
    more_is_better: bool = False
    decimals: int = 3

    def of(self, run: "Run") -> float:
        """The run's value; NaN where it has none."""
        if self.key == "recall":
            share = recall_of(run)
            return math.nan if share is None else share
        return run.summary["validation"][self.key]

    def cost(self, run: "Run") -> float:
        """The value, with its sign changed where more is better, so that small is good."""
        return -self.of(run) if self.more_is_better else self.of(run)

    def words(self, value: float) -> str:
        """A value as it is written."""
        return f"{100 * value:.1f} %" if self.key == "recall" else f"{value:.{self.decimals}f}"


def recall_of(run: "Run") -> float | None:
    """Share of targets met in the last validation, or else by `task=accuracy` on the run's own data."""
    share = run.summary["validation"].get("recall")
    if isinstance(share, int | float) and not isinstance(share, bool) and math.isfinite(share):
        return float(share)
    own = [measure for measure in run.evaluations.state_bytes if "(" not in measure and "," not in measure]
    return run.recalled(own[0]) if own else None


def quality_of(runs: list["Run"]) -> Quality:
    """One measure for all: bits per byte if all are of text, recall if all are synthetic and say it, else nats."""
    synthetic = [is_synthetic(run.settings) for run in runs]
    if runs and all(synthetic) and all(recall_of(run) is not None for run in runs):
        return Quality("recall", "recall", more_is_better=True)
    has_bytes = any(math.isfinite(run.summary["validation"]["bits_per_byte"]) for run in runs)
    if has_bytes and not any(synthetic):
        return Quality("bits_per_byte", "bits/byte")
    return Quality("loss", "nats/token")


def ranked(runs: list["Run"]) -> list["Run"]:
    """Best first; a value that is no number comes last."""
    quality = quality_of(runs)

    def place(run: "Run") -> tuple[bool, float, str]:
        cost = quality.cost(run)
        return not math.isfinite(cost), cost if math.isfinite(cost) else 0.0, run.label

    return sorted(runs, key=place)
