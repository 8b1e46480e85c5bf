"""The few plots longmix draws, all with the same hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed, and none is looked for

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from longmix.files import replace_file
from longmix.printable import printable

Curve = tuple[Sequence[float], Sequence[float]]


def plain(text: str) -> str:
    """Text for a picture in which no letter has a meaning: a dollar sign would begin a formula."""
    shown = printable(text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown  # a legend leaves such names out


def draw_curves(
    axes: Axes,
    curves: Mapping[str, Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    marker: str = "",
    colours: Sequence[str] | None = None,
    dashes: Sequence[tuple[int, ...]] | None = None,
) -> None:
    """One line per entry of `curves`, a pair of x and y values; `colours` and `dashes` have one of each."""
    for index, (label, (x, y)) in enumerate(curves.items()):
        style: dict[str, Any] = {} if colours is None else {"color": colours[index]}
        if dashes is not None and dashes[index]:
            style["linestyle"] = (0, dashes[index])
        axes.plot(x, y, marker=marker, markersize=3, linewidth=1.4, label=plain(label), **style)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(plain(title))
    axes.set_xlabel(x_label)
    axes.set_ylabel(plain(y_label))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize="small")


def draw_heat_map(
    axes: Axes,
    grid: np.ndarray,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    title: str,
    limits: tuple[float, float],
    colours: str,
    trained_seq_len: int,
) -> None:
    """Figures by depth and length, written into their cells; a line divides lengths trained at from longer ones.

    Args:
        axes: where to draw.
        grid: [depths, lengths].
        lengths: tokens of context, shortest first.
        depths: from the first token of the context, 0, to the last one, 1.
        title: above it.
        limits: which figures the first and the last colour stand for.
        colours: name of a colour map.
        trained_seq_len: tokens of a training window.
    """
    image = axes.imshow(grid, vmin=limits[0], vmax=limits[1], cmap=colours, aspect="auto")
    for (row, column), number in np.ndenumerate(grid):
        box = {"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1}
        axes.text(column, row, f"{number:.2f}", ha="center", va="center", fontsize="small", bbox=box)
    axes.axvline(sum(length <= trained_seq_len for length in lengths) - 0.5, color="black", linestyle="--", linewidth=1)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel(f"tokens of context; trained up to the line, {trained_seq_len:,}")
    axes.set_ylabel("depth")
    axes.set_title(plain(title))
    axes.figure.colorbar(image, ax=axes)


def new_figure(panels: int, columns: int | None = None) -> tuple[plt.Figure, list[Axes]]:
    """A figure with `panels` panels side by side, or in rows of `columns`."""
    columns = panels if columns is None else min(columns, panels)
    rows = -(-panels // columns)
    size = (5.2 * columns, 3.8 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    axes = list(grid.flat)
    for unused in axes[panels:]:
        unused.set_axis_off()
    return figure, axes[:panels]


def save_figure(figure: plt.Figure, path: Path) -> Path:
    """Write the figure as PNG in one step, so that no half picture replaces a whole one, and forget it.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        replace_file(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    finally:
        plt.close(figure)
    return path
