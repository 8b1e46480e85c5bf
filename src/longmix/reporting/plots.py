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
) -> None:
    """One line per entry of `curves`, a pair of x and y values."""
    for label, (x, y) in curves.items():
        axes.plot(x, y, marker=marker, markersize=3, linewidth=1.4, label=label)
    if log_x:
        axes.set_xscale("log", base=2)
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(fontsize="small")


def new_figure(panels: int) -> tuple[plt.Figure, list[Axes]]:
    """A figure with `panels` panels side by side."""
    figure, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 3.8), squeeze=False, layout="constrained")
    return figure, list(axes[0])


def save_figure(figure: plt.Figure, path: Path) -> Path:
    """Write the figure as PNG and forget it."""
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)
    return path
