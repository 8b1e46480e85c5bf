"""`evaluate.py task=states`: the growth of recurrent states with the position, gates, and bytes of states."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor

from longmix.analysis.effective_attention import engine_call, layer_inputs
from longmix.analysis.states import gate_statistics, log_root_mean_square
from longmix.batch import Batch
from longmix.errors import ConfigError
from longmix.evaluation.loss import to_device
from longmix.evaluation.memory import check_memory
from longmix.evaluation.subject import Subject
from longmix.evaluation.tasks.base import Answer, Task
from longmix.mixers.parts.base import Mixer
from longmix.mixers.parts.recurrent import RecurrentMixer
from longmix.mixers.parts.softmax import SoftmaxAttention
from longmix.mixers.parts.states import held_bytes
from longmix.progress import tracked
from longmix.reporting.labels import short
from longmix.reporting.plots import decimal_axis, draw_curves, draw_trained, drawing, new_figure, set_title
from longmix.reporting.style import INK, nth_style

TIMES_TRAINED = 8
"""Default length of windows, in trained lengths."""

LARGEST_COUNT = 2**40
"""The largest number of tokens, windows and pieces."""

EXPLODES = 10.0
"""A state that grows by more than this beyond the trained length is pointed out."""


@dataclass
class LayerStates:
    """The observations of one layer.

    Attributes:
        mixer: its name.
        kind: "recurrent" has a state that is one tensor per head, "cache" is a softmax mixer's, "other" is neither.
        sizes: of a recurrent one: position in the document, and log root mean square of each head's state [H].
        bytes: bytes of a row's state by the number of tokens before, whatever their documents.
    """

    mixer: str
    kind: str
    sizes: list[tuple[int, Tensor]] = field(default_factory=list)
    bytes: dict[int, int] = field(default_factory=dict)

    @property
    def recurrent(self) -> bool:
        """Whether its state has a size."""
        return self.kind == "recurrent"

    def by_position(self, width: int) -> list[dict[str, Any]]:
        """Mean over documents of the root mean square, of positions `width` apart: `{"position", "rms": [head]}`."""
        bins: dict[int, list[Tensor]] = {}
        for position, size in self.sizes:
            bins.setdefault(-(-position // width) * width, []).append(size.exp())
        return [{"position": end, "rms": torch.stack(bins[end]).mean(0).tolist()} for end in sorted(bins)]


class States(Task):
    """How recurrent states grow with the position, what gates do, and what states weigh.

    Windows of the split are read in pieces, and each layer's state is noted after every piece; gates at the trained
    length. States begin anew with each document.

    Args:
        length: tokens of a window; None takes 8 trained lengths, or what the split has.
        windows: how many windows, evenly spread over the split.
        points: pieces of a window.

    Raises:
        ConfigError: an impossible number.
    """

    name = "states"

    def __init__(self, length: int | None = None, windows: int = 4, points: int = 64) -> None:
        for name, number in (("length", length), ("windows", windows), ("points", points)):
            if number is not None and not 1 <= number <= LARGEST_COUNT:
                raise ConfigError(f"task.{name}={number} must be from 1 to {LARGEST_COUNT}.")
        self.length, self.windows, self.points = length, windows, points

    def ask(self, subject: Subject) -> Answer:
        """Read the windows.

        Returns:
            `{"split", "step", "trained_seq_len", "length", "layers": [{"mixer", "kind", "bytes": {tokens: bytes}}]}`,
            and for layers with a recurrent state also `"states": [{"position", "rms": [head]}]`, `"growth"`, the
            largest of a head's quotients of the last size by that at the trained length (None: no document is longer),
            and `"gates": [head]`, see `gate_statistics`.

        Raises:
            ConfigError: more memory than there is.
            DataError: the split has fewer tokens than `length`.
        """
        length = _length(subject, self.length)
        width = -(-length // self.points)
        asked = f"task.length={length} in {self.points} pieces"
        check_memory(subject.model, width, subject.restored, asked)
        layers = [LayerStates(type(mixer).__name__, kind_of(mixer)) for mixer in subject.model.mixers()]
        for batch in _windows(subject, length, self.windows):
            read_window(subject, batch, width, layers)
        gates = _gates(subject, min(length, subject.trained_seq_len), self.windows)
        report: dict[str, Any] = {"split": subject.split, "step": subject.step, "length": length}
        report |= {"trained_seq_len": subject.trained_seq_len, "layers": []}
        for layer, of_layer in zip(layers, gates, strict=True):
            report["layers"].append({"mixer": layer.mixer, "kind": layer.kind, "bytes": layer.bytes})
            if layer.recurrent:
                sizes = layer.by_position(width)
                growth = grown(sizes, subject.trained_seq_len)
                report["layers"][-1] |= {"states": sizes, "growth": growth, "gates": of_layer}
        return Answer(report, {"length": length, "windows": self.windows, "points": self.points})

    def measures(self, answer: Answer) -> dict[str, float]:
        """The numbers that training logs: size and growth of each recurrent layer's state, of its largest head."""
        found = {}
        for index, layer in enumerate(answer.report["layers"]):
            if layer.get("states"):
                found[f"rms/layer_{index}"] = max(layer["states"][-1]["rms"])
            if layer.get("growth") is not None:
                found[f"growth/layer_{index}"] = layer["growth"]
        return found

    def tables(self, answer: Answer) -> Iterator[RenderableType]:
        """Sizes, gates and bytes of each layer, and what stands out."""
        yield _table(answer.report)
        yield from _without_size(answer.report["layers"])
        yield from exploding(answer.report)

    @drawing()
    def figure(self, answer: Answer) -> Figure:
        """Sizes by position and half-lives of recurrent layers, and the bytes of all."""
        layers, trained = answer.report["layers"], answer.report["trained_seq_len"]
        recurrent = {f"{i} {layer['mixer']}": layer for i, layer in enumerate(layers) if "states" in layer}
        figure, panels = new_figure(3 if recurrent else 1)
        kinds = Counter((layer["mixer"], tuple(layer["bytes"].items())) for layer in layers)
        curves = {
            f"{count} x {mixer}": ([tokens for tokens, _ in held], [count * size / 1024 for _, size in held])
            for (mixer, held), count in kinds.items()
        }
        words: dict[str, Any] = {"title": "what a row remembers", "x_label": "tokens read", "y_label": "KiB"}
        draw_curves(panels[-1], curves, log_x=True, log_y=True, **words)
        if not recurrent:
            return figure
        sizes = {
            name: ([row["position"] for row in layer["states"]], [max(row["rms"]) for row in layer["states"]])
            for name, layer in recurrent.items()
        }
        words = {"title": "size of the largest head's state", "x_label": "tokens of the document"}
        draw_curves(panels[0], sizes, y_label="root mean square", log_y=True, **words)
        draw_trained(panels[0], trained)
        _draw_half_lives(panels[1], recurrent, trained)
        return figure


def kind_of(mixer: Mixer) -> str:
    """The kind of a mixer's state, see `LayerStates`."""
    if isinstance(mixer, RecurrentMixer):
        return "recurrent"
    return "cache" if isinstance(mixer, SoftmaxAttention) else "other"


def _length(subject: Subject, asked: int | None) -> int:
    """The length asked for, or 8 trained lengths, or the whole split if that is shorter.

    Raises:
        DataError: the split has fewer tokens than were asked for.
    """
    if asked is not None:
        subject.check_length(asked, "task.length")
        return asked
    tokens = subject.data.content(subject.split)["tokens"]
    most = TIMES_TRAINED * subject.trained_seq_len
    return most if tokens is None else min(most, max(tokens, subject.trained_seq_len))


@torch.no_grad()
def read_window(subject: Subject, batch: Batch, width: int, layers: list[LayerStates]) -> None:
    """Read one row of a batch, `width` tokens at a time, and note in `layers` what each remembers after that."""
    tokens, ids = batch["tokens"], batch["document_ids"]
    state: Any = subject.model.init_state(1)
    for start in range(0, tokens.shape[1], width):
        piece = slice(start, start + width)
        with subject.restored.autocast():
            output = subject.model(tokens[:, piece], state=state, document_ids=None if ids is None else ids[:, piece])
        state = output.state
        for layer, of_layer in zip(layers, state, strict=True):
            layer.bytes[min(start + width, tokens.shape[1])] = held_bytes(of_layer)[0]
            if layer.recurrent:
                size = log_root_mean_square(of_layer.mixer.carried)[0].cpu()
                layer.sizes.append((int(of_layer.mixer.next_position[0]), size))


def grown(sizes: list[dict[str, Any]], trained: int) -> float | None:
    """The most that a head's state grew from the last position within the trained length to the last of all."""
    within = [row for row in sizes if row["position"] <= trained]
    if not within or within[-1] is sizes[-1]:
        return None
    pairs = zip(sizes[-1]["rms"], within[-1]["rms"], strict=True)
    found = [last / before if before > 0 else math.inf if last > 0 else 1.0 for last, before in pairs]
    return max(found) if all(map(math.isfinite, found)) else math.inf


def _windows(subject: Subject, length: int, windows: int) -> Iterator[Batch]:
    loader = subject.data.evaluation_loader(subject.split, length, 1, windows * length)
    for batch in tracked(loader, f"windows of {length} tokens", len(loader)):
        yield to_device(batch, subject.restored.device)


@torch.no_grad()
def _gates(subject: Subject, length: int, windows: int) -> list[list[dict[str, float | None]] | None]:
    """Gates of each layer on windows that begin like a training window; None without a recurrent state."""
    mixers = subject.model.mixers()
    calls: list[list[Any]] = [[] for _ in mixers]
    if not any(isinstance(mixer, RecurrentMixer) for mixer in mixers):
        return [None] * len(mixers)
    for batch in _windows(subject, length, windows):
        with subject.restored.autocast():
            given = layer_inputs(subject.model, batch)
            for mixer, (x, options), of_layer in zip(mixers, given, calls, strict=True):
                if isinstance(mixer, RecurrentMixer):
                    try:
                        of_layer.append(engine_call(mixer, x, **options))
                    except ValueError as error:
                        raise ConfigError(f"task=states cannot see the gates of its mixer: {error}.") from error
    return [gate_statistics(of_layer) if of_layer else None for of_layer in calls]


def exploding(report: dict[str, Any]) -> Iterator[str]:
    """A line for each layer whose state grows by more than `EXPLODES` beyond the trained length."""
    for index, layer in enumerate(report["layers"]):
        growth = layer.get("growth")
        if growth is not None and not growth <= EXPLODES:
            yield (
                f"layer {index} {layer['mixer']}: a state EXPLODES, {growth:.3g} times as large after "
                f"{layer['states'][-1]['position']:,} tokens as after {report['trained_seq_len']:,}"
            )


def _without_size(layers: list[dict[str, Any]]) -> list[str]:
    """The note on layers for which only bytes are shown."""
    kinds = {kind: sorted({layer["mixer"] for layer in layers if layer["kind"] == kind}) for kind in ("cache", "other")}
    found = []
    if kinds["cache"]:
        found.append(
            f"{', '.join(kinds['cache'])}: a softmax mixer has no recurrent state; the bytes of its cache are above"
        )
    if kinds["other"]:
        found.append(
            f"of the state of {', '.join(kinds['other'])} only the bytes are known: a mixer that derives from "
            "RecurrentMixer (longmix.mixers.parts.recurrent) also shows how large its state grows and what its gates do"
        )
    return found


def _table(report: dict[str, Any]) -> Table:
    trained = report["trained_seq_len"]
    table = Table(
        title=f"heads' states after up to {report['length']:,} tokens of {report['split']}, growth since the trained "
        f"{trained:,}, half-lives in tokens, gates, and what a row remembers"
    )
    table.add_column("layer", no_wrap=True)
    headings = ("rms", "growth", "half-life", "input", "removal", "KiB")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for index, layer in enumerate(report["layers"]):
        held = f"{list(layer['bytes'].values())[-1] / 1024:,.1f}"
        if "states" not in layer:
            table.add_row(f"{index} {layer['mixer']}", *[""] * (len(headings) - 1), held)
            continue
        growth = "" if layer["growth"] is None else f"{layer['growth']:.3g}x"
        gates = (_range([gate.get(key) for gate in layer["gates"]]) for key in ("half_life", "input_gate", "removal"))
        table.add_row(f"{index} {layer['mixer']}", _range(layer["states"][-1]["rms"]), growth, *gates, held)
    return table


def _range(values: list[float | None]) -> str:
    """The smallest and largest value over heads."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = (f"{value:,.0f}" if 100 <= value < 1e6 else f"{value:.2g}" for value in (min(known), max(known)))
    return low if low == high else f"{low}-{high}"


def _draw_half_lives(axes: Axes, layers: dict[str, dict[str, Any]], trained: int) -> None:
    """A mark for each head; the bar through it spans 80 % of the head's channels."""
    colour = nth_style(0).light
    for index, layer in enumerate(layers.values()):
        gates = [gate for gate in layer["gates"] if gate["half_life"] is not None]
        heads = len(layer["gates"])
        for head, gate in enumerate(gates):
            x = index + 0.6 * ((head + 0.5) / heads - 0.5)
            span = [gate["half_life_low"], gate["half_life_high"] or gate["half_life"]]
            axes.plot([x, x], span, color=colour, linewidth=1.2, alpha=0.5)
            axes.plot(x, gate["half_life"], marker="o", markersize=4, color=colour)
    axes.axhline(trained, color=INK, linestyle=(0, (4, 3)), linewidth=1)
    decimal_axis(axes)
    axes.set_xticks(range(len(layers)), [short(name) for name in layers], rotation=20, ha="right")
    set_title(axes, "half-life of each head's state")
    axes.set_ylabel("tokens; dashed: trained length")
