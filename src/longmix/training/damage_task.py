"""`evaluate.py task=damage`: what each layer alone costs when it gets another mixer, see `longmix.training.damage`."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table

from longmix.composing import as_words, composed
from longmix.config import Choice
from longmix.config.choices import choice_or_pattern
from longmix.conversion.inherited import with_teachers_settings
from longmix.errors import ConfigError
from longmix.evaluation.loss import evaluate_loss, to_device
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.model.backbone import LanguageModel
from longmix.progress import steps_bar
from longmix.reporting.plots import draw_curves, drawing, new_figure
from longmix.training.damage import Damage, lessons_of, measure

LARGEST_COUNT = 2**40
"""The largest number of tokens."""


class DamageOfLayers(Task):
    """Convert each layer alone to another mixer, and measure the loss of the whole model.

    Args:
        mixer: that the layers get, such as "gla"; a file of `configs/mixer`.
        options: its settings, such as `{"key_factor": 1}`; others are as in a conversion.
        measure_tokens: from which each layer's new mixer first learns the outputs of the old one; 0 for none.

    Raises:
        ConfigError: no mixer, an impossible one, or an impossible number.
    """

    name = "damage"
    follows_training = False

    def __init__(
        self, mixer: str | None = None, options: Mapping[str, Any] | None = None, measure_tokens: int = 65_536
    ) -> None:
        if mixer is None:
            raise ConfigError("task.mixer has no value; give the mixer that the layers get, such as task.mixer=gla.")
        if not 0 <= measure_tokens <= LARGEST_COUNT:
            raise ConfigError(f"task.measure_tokens={measure_tokens} must be from 0 to {LARGEST_COUNT}.")
        self.mixer, self.options, self.measure_tokens = mixer, dict(options or {}), measure_tokens
        content = composed("train", [f"mixer={mixer}", *as_words({"mixer": self.options})]).content
        found = choice_or_pattern("mixer", content["mixer"])
        if not isinstance(found, Choice):
            raise ConfigError(f"task.mixer={mixer} is a pattern; give one mixer, which each layer gets alone.")
        self.choice = found

    def ask(self, subject: Subject) -> Answer:
        """Measure the teacher, and the model with each layer converted.

        Returns:
            `{"split", "step", "trained_seq_len", "precision", "mixer", "loss": the teacher's, "learned": tokens,
            "layers": [{"layer", "mixer": the teacher's, "loss", "damage"}], "order": layers, the largest damage
            first}`, in nats per token; a loss that is not finite is None, and so is its damage.

        Raises:
            ConfigError: a setting that the model cannot take, or more memory than there is.
            DataError: the split has no window.
        """
        restored, length = subject.restored, subject.trained_seq_len
        subject.check_length(length, "seq_len")
        subject.check_memory(length, "seq_len")
        batches = [to_device(batch, restored.device) for batch in subject.batches(length)]

        def loss(model: LanguageModel) -> float:
            statistics = subject.loss_statistics(length)
            evaluate_loss(model, batches, statistics, device=restored.device, precision=restored.autocast)
            return statistics.summary()["loss"]

        steps = -(-self.measure_tokens // length)
        teacher = subject.model
        trained = {name: weight.requires_grad for name, weight in teacher.named_parameters()}
        teacher.requires_grad_(False)
        try:
            with steps_bar("layers", len(teacher.blocks)) as advance:
                found = measure(
                    teacher,
                    restored.config,
                    cast(Choice, with_teachers_settings(self.choice, self.options, restored.config.mixer)),
                    lessons_of(subject.data, steps),
                    loss,
                    steps=steps,
                    seed=restored.config.seed,
                    precision=restored.autocast,
                    done=advance,
                )
        finally:
            for name, weight in teacher.named_parameters():
                weight.requires_grad_(trained[name])
        return Answer({**subject.heading(), **self._report(teacher, found)}, self._settings(subject))

    def _report(self, teacher: LanguageModel, found: Damage) -> dict[str, Any]:
        entries = found.report()["damage"]
        names = [type(mixer).__name__ for mixer in teacher.mixers()]
        layers = [
            {"layer": layer, "mixer": name, "loss": loss, "damage": damage}
            for layer, (name, loss, damage) in enumerate(zip(names, entries["losses"], entries["damage"], strict=True))
        ]
        return {
            "mixer": self.mixer,
            "loss": found.before,
            "learned": found.learned,
            "layers": layers,
            "order": found.order,
        }

    def _settings(self, subject: Subject) -> dict[str, Any]:
        own = {"mixer": self.mixer, "options": self.options, "measure_tokens": self.measure_tokens}
        return own | {"max_tokens": subject.config.max_tokens} | subject.stride_used()

    def tables(self, answer: Answer) -> Iterator[RenderableType]:
        """Each layer's loss and damage, and the layers in order."""
        report = answer.report
        table = Table(
            title=f"one layer alone with {report['mixer']}, which learned from {report['learned']:,} tokens: loss of "
            "the whole model, and damage, in nats per token"
        )
        for heading in ("layer", "mixer before", "loss", "damage"):
            table.add_column(heading, justify="left" if heading == "mixer before" else "right")
        table.add_row("none", "", f"{report['loss']:.4f}", "")
        for row in report["layers"]:
            cells = ("not finite" if row[key] is None else f"{row[key]:.4f}" for key in ("loss", "damage"))
            table.add_row(str(row["layer"]), row["mixer"], *cells)
        yield table
        yield f"largest damage first: {', '.join(map(str, report['order']))}"

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """The damage of each layer."""
        report = answer.report
        figure, (axes,) = new_figure(1)
        there = [row for row in report["layers"] if row["damage"] is not None]
        curve = [row["layer"] for row in there], [row["damage"] for row in there]
        title = f"damage of one layer with {report['mixer']}"
        draw_curves(axes, {report["mixer"]: curve}, title=title, x_label="layer", y_label="nats per token")
        places = [row["layer"] for row in report["layers"]]
        axes.set_xticks(places if len(places) <= 12 else places[:: -(-len(places) // 12)])
        return figure
