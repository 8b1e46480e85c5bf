"""Pictures of effective attention: heat maps of signed shares on a logarithmic scale, and how far the mass lies."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from longmix.reporting.plots import drawing, new_figure, plain
from longmix.reporting.style import INK

DECADES = 4
"""The smallest coloured share is 10 to the power of minus this."""

CELLS = 160
"""Most cells along a side of a heat map: more would be smaller than a pixel."""

SIDE = 205
"""Points of a heat map with its names."""

MOST_SHOWN = 8
"""Most layers, and heads, in one picture; of more, so many evenly spread ones."""


@dataclass(frozen=True)
class LayerMaps:
    """The content of a layer's pictures.

    Attributes:
        mixer: its name.
        shares: [H, cells, cells], signed shares of one window, from `shrunk`.
        heads: the statistics of each head, as `AttentionStatistics.summary` gives them.
        reason: why the layer has neither, as it is not known how it mixes its values; None where it has both.
    """

    mixer: str
    shares: Tensor
    heads: list[dict[str, Any]]
    reason: str | None = None


def shrunk(shares: Tensor) -> Tensor:
    """[H, T, T] with at most `CELLS` cells along a side; each is the entry of largest magnitude within it."""
    size = -(-shares.shape[-1] // CELLS)
    padded = F.pad(shares, (0, -shares.shape[-1] % size, 0, -shares.shape[-1] % size))
    _, indices = F.max_pool2d(padded.abs()[None], size, return_indices=True)
    return padded.flatten(1).gather(1, indices[0].flatten(1)).view(indices.shape[1:])


def evenly(count: int, most: int = MOST_SHOWN) -> list[int]:
    """At most so many of 0 .. count - 1, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(number * (count - 1) / (most - 1)) for number in range(most)})


@drawing()
def draw_model(layers: Sequence[LayerMaps], length: int, title: str) -> Figure:
    """A row for each layer that has maps: a heat map of each head, and where the mass of each lies."""
    rows, columns = _some_rows(layers), evenly(max(len(layer.heads) for layer in layers))
    figure, axes = _grid(len(rows), len(columns) + 1, title)
    image = None
    for line, index in zip(axes, rows, strict=True):
        layer = layers[index]
        for panel, head in zip(line, columns, strict=False):
            if head >= len(layer.heads):
                panel.axis("off")
                continue
            image = draw_map(panel, layer.shares[head], length, f"layer {index}, head {head}\n{_caption(layer, head)}")
        line[0].set_ylabel(f"{layer.mixer}\nquery", fontsize="small")
        shown = {f"head {head}": layer.heads[head]["histogram"] for head in columns if head < len(layer.heads)}
        draw_histogram(line[-1], shown, "mass by distance", named=line is axes[0])
    return _finished(figure, axes, image)


@drawing()
def draw_comparison(models: dict[str, Sequence[LayerMaps]], length: int, title: str) -> Figure:
    """A column for each model, a row for each layer with the mean over its heads, and below where their mass lies."""
    rows = sorted({index for layers in models.values() for index in _some_rows(layers)})
    rows = [rows[place] for place in evenly(len(rows))]
    figure, axes = _grid(len(rows) + 1, len(models), title)
    image = None
    for column, (name, layers) in enumerate(models.items()):
        heading = f"{plain(name)}\n"
        for line, index in zip(axes, rows, strict=False):
            if index >= len(layers) or layers[index].reason is not None:
                line[column].axis("off")
                continue
            shares = layers[index].shares.mean(0)
            image = draw_map(line[column], shares, length, f"{heading}layer {index}, {layers[index].mixer}")
            heading = ""
        shown = {f"layer {index}": _mean_histogram(layers[index]) for index in _some_rows(layers)}
        draw_histogram(axes[-1][column], shown, "mass by distance, mean over heads", named=column == 0)
    highest = max(panel.get_ylim()[1] for panel in axes[-1])
    for panel in axes[-1]:
        panel.set_ylim(0, highest)
    return _finished(figure, axes, image)


def _some_rows(layers: Sequence[LayerMaps]) -> list[int]:
    """The layers that have maps; of more than a picture takes, some."""
    seen = [index for index, layer in enumerate(layers) if layer.reason is None]
    return [seen[place] for place in evenly(len(seen))]


def _mean_histogram(layer: LayerMaps) -> list[float]:
    found: list[float] = torch.tensor([head["histogram"] for head in layer.heads]).mean(0).tolist()
    return found


def draw_map(axes: Axes, shares: Tensor, length: int, title: str) -> Any:
    """One matrix: red for positive shares, blue for negative ones, white below the scale."""
    strength = (1 + shares.abs().clamp(min=1e-30).log10() / DECADES).clamp(0, 1) * shares.sign()
    image = axes.imshow(
        strength.cpu().numpy(),
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
        extent=(0, length, length, 0),
        interpolation="nearest",
    )
    axes.grid(visible=False)
    axes.set_title(title, fontsize="x-small")
    axes.set_xticks([0, length], ["0", str(length)], fontsize="x-small")
    axes.set_yticks([0, length], ["0", str(length)], fontsize="x-small")
    return image


def draw_histogram(axes: Axes, histograms: dict[str, list[float]], title: str, named: bool = True) -> None:
    """The share of the mass in each of `distance_bins`: a line for each head or layer, later ones lighter."""
    colours = colormaps["viridis"]
    for index, (name, shares) in enumerate(histograms.items()):
        colour = colours(0.9 * index / max(len(histograms) - 1, 1))
        axes.plot(shares, marker="o", markersize=2.5, linewidth=1.2, color=colour, label=name)
    bins = max(len(shares) for shares in histograms.values())
    labels = ["0", *(str(2**n) for n in range(bins - 1))]
    some = [number for number in range(bins) if number % 2 == 0 or bins < 6]
    axes.set_xticks(some, [labels[number] for number in some], fontsize="x-small")
    axes.set_ylim(0, None)
    axes.set_box_aspect(1)
    axes.tick_params(axis="y", labelsize="x-small")
    axes.set_title(title, fontsize="x-small")
    if named:
        axes.legend(fontsize="x-small", labelcolor=INK, handlelength=1.2, borderpad=0)


def _caption(layer: LayerMaps, head: int) -> str:
    found = layer.heads[head]
    return f"90 % within {found['receptive_field']:.0f}, {100 * found['negative_mass']:.0f} % negative"


def _grid(rows: int, columns: int, title: str) -> tuple[Figure, list[list[Axes]]]:
    figure, axes = new_figure(rows * columns, columns, width=SIDE, height=SIDE, title=title)
    return figure, [axes[row * columns : (row + 1) * columns] for row in range(rows)]


def _finished(figure: Figure, axes: list[list[Axes]], image: Any) -> Figure:
    for panel in axes[-1]:
        panel.set_xlabel("distance, tokens" if panel.lines else "key", fontsize="x-small")
    bar = figure.colorbar(image, ax=[panel for line in axes for panel in line], shrink=0.6, aspect=40, pad=0.01)
    exponents = range(0, DECADES, 2)
    values = [1 - n / DECADES for n in exponents]
    ticks = [*(-value for value in values), 0, *reversed(values)]
    texts = [f"{100 * 10.0**-n:g} %" for n in exponents]
    bar.set_ticks(ticks, labels=[*(f"-{text}" for text in texts), f"< {100 * 10.0**-DECADES:g} %", *reversed(texts)])
    bar.set_label("share of the row's mass", fontsize="x-small")
    bar.ax.tick_params(labelsize="x-small")
    bar.outline.set_visible(False)
    return figure
