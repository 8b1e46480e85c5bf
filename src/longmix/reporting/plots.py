"""The few plots longmix draws, all with the same hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none is looked for

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Curve = tuple[Sequence[float], Sequence[float]]


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
) -> None:
    """One line per entry of `curves`, a pair of x and y values; `colours` has one of each."""
    for index, (label, (x, y)) in enumerate(curves.items()):
        colour = None if colours is None else colours[index]
        axes.plot(x, y, marker=marker, markersize=3, linewidth=1.4, label=label, color=colour)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize="small")


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
    """Write the figure as PNG and forget it."""
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
    return path
