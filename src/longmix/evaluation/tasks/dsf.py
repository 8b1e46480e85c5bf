"""`evaluate.py task=dsf`: every layer in the dynamical form, one table of all mixers of a model."""

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import RenderableType
from rich.table import Table

from longmix.analysis.dsf import TOLERANCE, DynamicalForm, dynamical_form
from longmix.analysis.effective_attention import layer_inputs
from longmix.errors import ConfigError
from longmix.evaluation.loss import to_device
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.progress import tracked
from longmix.reporting.plots import decimal_axis, drawing, new_figure, plain, set_title
from longmix.reporting.style import INK, nth_style

USUAL_LENGTH, MOST_TOKENS = 256, 4096
"""Tokens of a window that are taken if none are asked for, and the most: matrices have their square, in float64."""

MOST_WINDOWS = 100_000

COLUMNS = {
    "state_size": ("n", ",.4g"),
    "state_entries": ("N", ",.0f"),
    "bytes": ("bytes", ",.0f"),
    "decay_product": ("lam", ".1g"),
    "half_life": ("half-life", ",.4g"),
    "effective_rank": ("rank", ".1f"),
    "first_token_mass": ("first", ".1%"),
}
"""The columns of the table, each with heading and format."""


class DSF(Task):
    """The dynamical form of every layer on windows of the split, see `longmix.analysis.dsf`.

    Args:
        length: tokens of a window; None takes those of training, but at most 256.
        windows: how many windows, evenly spread over the split.

    Raises:
        ConfigError: an impossible number.
    """

    name = "dsf"

    def __init__(self, length: int | None = None, windows: int = 2) -> None:
        if length is not None and not 2 <= length <= MOST_TOKENS:
            raise ConfigError(f"task.length={length} must be from 2 to {MOST_TOKENS}; matrices have its square.")
        if not 1 <= windows <= MOST_WINDOWS:
            raise ConfigError(f"task.windows={windows} must be from 1 to {MOST_WINDOWS}.")
        self.length, self.windows = length, windows

    def ask(self, subject: Subject) -> Answer:
        """Compute the form of every layer.

        Returns:
            `{"split", "step", "trained_seq_len", "precision", "length", "windows", "holds", "layers": [{"mixer",
            "bytes", "holds", "reason", and the attributes of `DynamicalForm`}]}`, means over windows, the largest for
            `error` and `decay_product`. `holds` says whether Phi reproduces the output; it is None, and `reason` says
            why, where nobody knows how a layer mixes its values. `bytes` are those of its state after a window.

        Raises:
            ConfigError: windows of one token.
            DataError: the split has fewer tokens than `length`.
        """
        length = min(subject.trained_seq_len, USUAL_LENGTH) if self.length is None else self.length
        if length < 2:
            raise ConfigError(f"the model was trained on windows of {length} token; give task.length from 2 on.")
        subject.check_length(length, "task.length")
        mixers = subject.model.mixers()
        forms: list[list[DynamicalForm]] = [[] for _ in mixers]
        reasons: list[str | None] = [None for _ in mixers]
        loader = subject.data.evaluation_loader(subject.split, length, 1, self.windows * length)
        for batch in tracked(loader, f"windows of {length} tokens", len(loader)):
            with torch.no_grad():
                given = layer_inputs(subject.model, to_device(batch, subject.restored.device))
            for index, (mixer, (x, options)) in enumerate(zip(mixers, given, strict=True)):
                try:
                    forms[index].append(dynamical_form(mixer, x, options))
                except ValueError as error:
                    reasons[index] = str(error)
        layers: list[dict[str, Any]] = [
            {"mixer": type(mixer).__name__, "bytes": mixer.state_bytes(length), **_joined(of_layer), "reason": reason}
            for mixer, of_layer, reason in zip(mixers, forms, reasons, strict=True)
        ]
        report = {**subject.heading(), "length": length, "windows": len(loader)}
        report |= {"holds": all(layer["holds"] for layer in layers), "layers": layers}
        return Answer(report, {"length": length, "windows": self.windows})

    def measures(self, answer: Answer) -> dict[str, float]:
        """The numbers that training logs, layer by layer."""
        names = ("effective_rank", "first_token_mass", "half_life", "decay_product")
        return {
            f"{name}/layer_{index}": layer[name]
            for index, layer in enumerate(answer.report["layers"])
            for name in names
            if layer[name] is not None
        }

    def tables(self, answer: Answer) -> Iterator[RenderableType]:
        """One row for each layer; layers that the form does not hold for, by name."""
        report = answer.report
        table = Table(
            title=f"dynamical form of each layer on {report['length']:,} tokens: n entries of the state for a channel, "
            "N in all; its bytes; largest product of decays over the window; half-life in tokens; effective rank of "
            "Phi, and its mass on the document's first token"
        )
        table.add_column("layer", no_wrap=True)
        for heading, _ in COLUMNS.values():
            table.add_column(heading, justify="right")
        for index, layer in enumerate(report["layers"]):
            cells = ["" if layer[key] is None else format(layer[key], spec) for key, (_, spec) in COLUMNS.items()]
            table.add_row(f"{index} {layer['mixer']}", *cells)
        yield table
        known = [layer["error"] for layer in report["layers"] if layer["error"] is not None]
        if report["holds"]:
            yield f"Phi v is the output of every layer, to {max(known):.0e}"
        for index, layer in enumerate(report["layers"]):
            if layer["reason"] is not None:
                yield f"layer {index}: no form, {layer['reason']}"
            elif not layer["holds"]:
                yield f"layer {index} {layer['mixer']}: Phi v misses the output by {layer['error']:.0e} > {TOLERANCE:g}"

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """State, memory and rank by layer."""
        figure, panels = new_figure(4, 2)
        shown = {
            "bytes": ("bytes of the state", True),
            "half_life": ("half-life, tokens", True),
            "effective_rank": ("effective rank of Phi", False),
            "first_token_mass": ("mass on the first token", False),
        }
        layers = answer.report["layers"]
        kinds = sorted({layer["mixer"] for layer in layers})
        for axes, (key, (title, log)) in zip(panels, shown.items(), strict=True):
            for number, kind in enumerate(kinds):
                there = [(i, layer[key]) for i, layer in enumerate(layers) if layer["mixer"] == kind]
                points = [(index, value) for index, value in there if value is not None]
                places, values = zip(*points, strict=True) if points else ((), ())
                style = nth_style(number)
                axes.plot(places, values, style.marker, color=style.light, markersize=6, label=plain(kind))
            if log and all(layer[key] is None or layer[key] > 0 for layer in layers):
                decimal_axis(axes)
            set_title(axes, title)
            axes.set_xlabel("layer")
            axes.set_xlim(-0.5, len(layers) - 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].legend(labelcolor=INK)
        return figure


def _joined(forms: list[DynamicalForm]) -> dict[str, Any]:
    """One layer's form over windows; None for each where there is none."""
    joined: dict[str, Any] = {}
    for name in DynamicalForm.__dataclass_fields__:
        values = [value for form in forms if (value := getattr(form, name)) is not None]
        of_windows = max if name in ("error", "decay_product") else fmean
        joined[name] = of_windows(values) if values else None
    return joined | {"holds": all(form.holds for form in forms) if forms else None}
