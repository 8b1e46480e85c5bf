"""Weights of a teacher in a model with other mixers: what is outside the mixers as it is, of the mixers what fits.

Each mixer says what it takes by `Mixer.taken_from`; what most of them do stands in `longmix.mixers.parts.taken`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from longmix.config import ModelConfig
from longmix.files import replace_json
from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.taken import HEADS, head_width
from longmix.model.backbone import LanguageModel
from longmix.model.build import check_model
from longmix.model.tuned_states_file import MARK, memory_features, tune_states, tuned_states

TRANSFER_FILE = "transfer.json"


@dataclass
class Transfer:
    """What became of each of a model's weights, by name.

    Attributes:
        taken: those of the teacher as they are.
        repeated: those with each head of the teacher several times.
        widened: those with heads that are wider than the teacher's, which may stand several times too.
        new: those as they began.
        parameters: how many numbers each of them has; of a tied head none, since they are the embedding's.
    """

    taken: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    widened: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The report in one line."""
        total = sum(self.parameters.values())
        whole = (*self.taken, *self.repeated)
        carried = sum(self.parameters[name] for name in whole)
        rest = ""
        for place in ("widened", "new"):
            kinds = dict.fromkeys(name.split(".mixer.")[-1].removesuffix(".weight") for name in getattr(self, place))
            rest += f"; {place}: {', '.join(kinds)}" if kinds else ""
        return (
            f"{len(whole)} of {len(self.parameters)} tensors and {carried / total:.1%} of "
            f"the {total:,} weights are the teacher's{rest}."
        )

    def write(self, folder: Path, besides: Mapping[str, Any] | None = None) -> None:
        """Leave the report in a run's folder.

        Args:
            folder: the run's.
            besides: further entries.

        Raises:
            StorageError: the file cannot be written.
        """
        parts: dict[str, Any] = {"taken": self.taken, "repeated": self.repeated, "widened": self.widened}
        parts["new"] = self.new
        whole = parts | {"parameters": self.parameters, "summary": self.line}
        replace_json(folder / TRANSFER_FILE, whole | dict(besides or {}))


def transfer(model: LanguageModel, weights: Mapping[str, Tensor], teacher: ModelConfig) -> Transfer:
    """Give a new model a teacher's weights.

    Args:
        model: with its first weights; its sizes outside the mixers are the teacher's.
        weights: the teacher's, by name.
        teacher: its configuration.

    Returns:
        What was taken. The model's other weights are as they were, and tuned states that no teacher's mixer has are
        zero.
    """
    mixers = check_model(teacher).mixers()
    _make_room_for_states(model, mixers, weights)
    report, own = Transfer(), model.state_dict()
    outside = [name for name in own if ".mixer." not in name and name in weights]
    found = {name: weights[name] for name in outside if weights[name].shape == own[name].shape}
    repeated, widened = set[str](), set[str]()
    for index, (mixer, taught) in enumerate(zip(model.mixers(), mixers, strict=True)):
        prefix = f"blocks.{index}.mixer."
        theirs = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        taken = mixer.taken_from(taught, theirs)
        for name, x in taken.items():
            if x.shape != theirs[name].shape:
                same = name not in HEADS or head_width(mixer, name) == head_width(taught, name)
                (repeated if same else widened).add(prefix + name)
        found |= {prefix + name: x for name, x in taken.items()}
    seen: set[int] = set()
    for name, x in own.items():
        report.parameters[name] = 0 if x.data_ptr() in seen else x.numel()
        seen.add(x.data_ptr())
        changed = report.repeated if name in repeated else report.widened if name in widened else report.taken
        (changed if name in found else report.new).append(name)
    model.load_state_dict(found, strict=False)
    return report


def _make_room_for_states(model: LanguageModel, mixers: Sequence[Mixer], weights: Mapping[str, Tensor]) -> None:
    """Let a model have tuned states if a layer keeps the class of a teacher's mixer that has some."""
    tuned = {name.partition(MARK)[0] for name in tuned_states(weights)}
    pairs = enumerate(zip(model.mixers(), mixers, strict=True))
    if any(type(own) is type(theirs) and f"blocks.{index}.mixer" in tuned for index, (own, theirs) in pairs):
        tune_states(model, memory_features(weights))
